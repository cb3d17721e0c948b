"""Writes the table of what each strategy sends and keeps, by closed forms.

Tests hold these to the ledger of sim and to live tensors. ``make matrix`` writes it: ``python -m
benchmarks.tables.volume build/matrix/volume.md``. ``docs/volume.md`` states the figures of eight ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longctx.attention import AttentionCase, Strategy, StrategyOptions, get_strategy, inner_of, refusal
from longctx.attention.costs.estimate import Costs, Volume
from longctx.attention.runtime.registry import costs_of
from longctx.attention.runtime.sizes import Sizes
from longctx.catalog import LAYOUTS
from longctx.options import DEFAULT
from longctx.rules import divisors
from longctx.sequence import Documents, Mask, SequencePlan, make_layout, make_plan

WORLDS = (2, 3, 4, 8)
HEADS = ((32, 8), (32, 32))
HEAD_DIM = 128
ELEMENT, WIDE = 2, 4  # bytes: bfloat16, and float32 to sum in
SHARD = 1024  # tokens of a rank
CAUSAL = Mask()
REFUSED = "–"
WITHIN = 512  # bytes: single numbers and indices, which closed forms of memory leave out
# How many times what is alive the closed form of a strategy's peak memory may be; those of all others are just that.
ABOVE = {"gather": 1.1, "token_ring": 1.5, "tree": 1.3, "rsa": 1.2, "disaggregated": 2.5, "zeppelin": 2.5}

PAGE = """# What each strategy sends, and keeps

Made by `make matrix` from the closed forms in `longctx/attention/costs` (`volume` and `peak_memory`);
do not edit. `make matrix` holds the same formulas, byte for byte and message for message, to the ledger of `sim`:
every strategy with each of its choices, on 2, 3, 4 and 8 ranks, every layout, with one document and several, causal
and full, with and without a window, with as many key/value heads as query heads and with fewer (`tests/volume`).

One layer, one causal document of {shard} tokens a rank, heads of {dim} channels, {q_heads} of them of queries and
{few} or {many} of keys and values, bfloat16. **KiB per local token** that a rank sends; where ranks differ, their mean
and the busiest; {refused} where it refuses, because ranks do not divide {q_heads} heads. Messages are those of the
busiest rank, forward + backward, with {few} key/value heads. `a×b` are `b` rows of `a` ranks
(`attention.ulysses_degree`, `attention.inner_ring`); `kv` and `q` stand for `attention.backward_rotates`, `compute`
for `attention.grad_dtype`.

**Peak** is memory, in the same unit: bytes of tensors alive at one time beside q, k, v and dout on the rank with most,
results included, the local kernel's own workspace apart. `make matrix` holds `peak_memory` to what is alive on `sim`,
for the same strategies, choices and layouts, with every packing and every mask: as much, to within {small} bytes;
where a form is a bound, at most that, and at least a part of it: {above}. Scores of `rsa` grow with the whole sequence.

{tables}
"""


@dataclass(frozen=True)
class Choice:
    """Describes a row of each table: a strategy with options that change what it sends."""

    strategy: str
    options: StrategyOptions = DEFAULT
    rows: bool = False  # ranks as several rows of several ranks
    layouts: tuple[str, ...] = tuple(LAYOUTS)

    def inner(self, world: int) -> int | None:
        """Returns the ranks in a row: the largest divisor below the world; None where it is left to the strategy."""
        return max(n for n in divisors(world) if n < world) if self.rows else None

    def name(self, world: int) -> str:
        """Names the choice, with its options."""
        words = [f"`{self.strategy}`"]
        words += [f"{self.inner(world)}×{world // (self.inner(world) or 1)}"] if self.rows else []
        words += list(self.options.chosen().values())
        return ", ".join(words)


COMPUTE = StrategyOptions(grad_dtype="compute")
CHOICES = (
    Choice("ring"),
    Choice("ring", COMPUTE),
    Choice("burst", StrategyOptions(backward_rotates="q")),
    Choice("burst", StrategyOptions(grad_dtype="compute", backward_rotates="q")),
    Choice("burst", StrategyOptions(backward_rotates="kv"), rows=True),
    Choice("token_ring"),
    Choice("token_ring", COMPUTE),
    Choice("tree"),
    Choice("tree", COMPUTE),
    Choice("gather"),
    Choice("gather", COMPUTE),
    Choice("usp", rows=True),
    Choice("ulysses"),
    Choice("rsa"),
    # Over single tokens of other layouts, planning alone takes seconds.
    Choice("disaggregated", layouts=("contiguous",)),
    Choice("zeppelin", layouts=("contiguous",)),
)


def page() -> str:
    """Returns the whole page as Markdown."""
    (q_heads, few), (_, many) = HEADS
    tables = "\n\n".join("\n".join(table(world)) for world in WORLDS)
    above = ", ".join(f"`{name}` 1/{most}" for name, most in ABOVE.items())
    heads = {"q_heads": q_heads, "few": few, "many": many}
    return PAGE.format(shard=SHARD, dim=HEAD_DIM, refused=REFUSED, tables=tables, above=above, small=WITHIN, **heads)


def table(world: int) -> Iterator[str]:
    """Yields the lines of a world's table; layouts that cost the same share one."""
    columns = [f"{heads}/{kv_heads} {way}" for heads, kv_heads in HEADS for way in ("forward", "backward")]
    titles = [*columns, "messages", *(f"peak {column}" for column in columns)]
    yield f"## {world} ranks\n"
    yield f"| strategy | layout | {' | '.join(titles)} |"
    yield f"|---|---|{'---|' * len(titles)}"
    for choice in CHOICES:
        if choice.rows and choice.inner(world) == 1:
            continue
        by_cells: dict[tuple[str, ...], list[str]] = {}
        for layout in choice.layouts:
            by_cells.setdefault(cells(choice, layout, world), []).append(layout)
        for found, layouts in by_cells.items():
            of = "all" if len(layouts) == len(LAYOUTS) else ", ".join(layouts)
            yield f"| {choice.name(world)} | {of} | {' | '.join(found)} |"


def worst(world: int = WORLDS[-1]) -> Iterator[str]:
    """Yields the lines of a short table: of each choice the busiest rank under its dearest layout, few key/value heads.

    Columns: KiB per local token sent forward and backward, and the peak of both passes.
    """
    yield "| strategy | forward | backward | peak |"
    yield "|---|---|---|---|"
    for choice in CHOICES:
        found = [cells(choice, layout, world) for layout in choice.layouts]
        sent = [max((row[way].split(", ")[-1] for row in found), key=_number) for way in (0, 1)]
        peak = max((row[6] for row in found), key=_number)
        yield f"| {choice.name(world)} | {' | '.join((*sent, peak))} |"


def _number(cell: str) -> float:
    return -1 if cell == REFUSED else float(cell)


def cells(choice: Choice, layout: str, world: int) -> tuple[str, ...]:
    """Computes a row: bytes forward and backward for each of ``HEADS``, messages, peak memory for each; or refuses."""
    plan, strategy = plan_of(layout, world), get_strategy(choice.strategy)
    found: list[str] = []
    peaks: list[str] = []
    messages = ""
    for heads, kv_heads in HEADS:
        case = AttentionCase(world, heads, kv_heads, layout, CAUSAL, options_of(choice, strategy, world))
        if refusal(strategy, case):
            found += [REFUSED, REFUSED]
            peaks += [REFUSED, REFUSED]
            continue
        peak = closed_forms(strategy).peak_memory(plan, sizes_of(strategy, case))
        peaks += [_kib(peak.forward), _kib(peak.backward)]
        volumes = by_rank(strategy, case, plan)
        found += [_mean_and_most([one.forward for one in volumes]), _mean_and_most([one.backward for one in volumes])]
        most = [max(column) for column in zip(*((v.messages_forward, v.messages_backward) for v in volumes))]
        messages = messages or " + ".join(map(str, most))
    return (*found, messages, *peaks)


def by_rank(strategy: Strategy, case: AttentionCase, plan: SequencePlan) -> list[Volume]:
    """Returns what each rank sends."""
    volume = closed_forms(strategy).volume
    return [volume(plan, rank, sizes_of(strategy, case)) for rank in range(case.world)]


def closed_forms(strategy: Strategy) -> Costs:
    """Returns the strategy's estimate, which all of this table have."""
    found = costs_of(strategy)
    assert found is not None, f"{strategy.name} has no closed forms: leave it out of CHOICES"
    return found


def options_of(choice: Choice, strategy: Strategy, world: int) -> StrategyOptions:
    """Returns the choice's options, with its rows of the grid."""
    if choice.inner(world) is None:
        return choice.options
    assert strategy.grid is not None and strategy.grid.option is not None, "rows are chosen where there is a choice"
    return StrategyOptions(**{**vars(choice.options), strategy.grid.option: choice.inner(world)})


def sizes_of(strategy: Strategy, case: AttentionCase) -> Sizes:
    """Returns the bytes that the case's tensors take in messages."""
    return Sizes(1, case.heads, case.kv_heads, HEAD_DIM, ELEMENT, WIDE, inner_of(strategy, case), case.options)


def plan_of(layout: str, world: int) -> SequencePlan:
    """Plans the table's sequence under a layout."""
    return make_plan((Documents.single(world * SHARD),), CAUSAL, make_layout(layout), world * SHARD, world)


def _mean_and_most(numbers: list[int]) -> str:
    mean, most = (_kib(number) for number in (sum(numbers) / len(numbers), max(numbers)))
    return mean if mean == most else f"{mean}, {most}"


def _kib(number: float) -> str:
    return f"{number / 1024 / SHARD:.1f}".removesuffix(".0")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page to the given file, or prints the short table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables.volume", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="left out: print the table of docs/volume.md")
    file: Path | None = parser.parse_args(argv).file
    if file is None:
        print("\n".join(worst()))
    else:
        file.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
