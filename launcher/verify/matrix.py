"""The matrix of ``longctx verify --all``: its cases, and the page that shows what became of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from longctx.catalog import LAYOUTS, LINEAR_STRATEGIES, MIXERS, STRATEGIES
from longctx.linear import get_mixer
from longctx.verify import Verdict, VerifyCase

CHUNK = 16  # of linear layers in the matrix
SMALL_BLOCK = 4  # there, of mixers that compute by blocks: several to a document, so that queries choose


def matrix(seq: int, dtype: str, backend: str) -> Iterator[VerifyCase]:
    """Yields strategy x layout x mask x heads x world; documents end on shard edges and hold single tokens."""
    half = seq // 2
    packed = (half - 1, 1, 1, seq - half - 1) if seq >= 4 else (1,) * seq
    window = max(1, seq // 5)
    masks: tuple[dict[str, object], ...] = (
        {"causal": False},
        {},
        {"documents": packed},
        {"window": window},
        {"documents": packed, "window": window},
        {"causal": False, "documents": packed, "window": window},
    )
    heads = ((4, 4), (8, 2), (4, 1))
    for strategy, layout, mask, (q_heads, kv_heads), world in itertools.product(
        STRATEGIES, LAYOUTS, masks, heads, (1, 2, 3, 4, 8)
    ):
        yield VerifyCase(
            strategy,
            layout,
            world,
            backend,
            seq,
            heads=q_heads,
            kv_heads=kv_heads,
            head_dim=8,
            dtype=dtype,
            **mask,  # type: ignore[arg-type]
        )
    # Of linear layers stripes are as long as chunks, or they are refused.
    linear_masks = masks[:3]
    for strategy, mixer, layout, mask, world in itertools.product(
        LINEAR_STRATEGIES, MIXERS, LAYOUTS, linear_masks, (1, 2, 3, 4, 8)
    ):
        reads = get_mixer(mixer).reads
        yield VerifyCase(
            strategy,
            layout,
            world,
            backend,
            seq,
            heads=4,
            kv_heads=4,
            head_dim=8,
            dtype=dtype,
            layout_block=CHUNK if layout == "striped" else 1,
            mixer=mixer,
            chunk=CHUNK if get_mixer(mixer).has_states else VerifyCase.chunk,
            mixer_block=SMALL_BLOCK if "mixer_block" in reads else None,
            mixer_top_k=2 if "mixer_top_k" in reads else None,
            **mask,  # type: ignore[arg-type]
        )


PAGE = """# Exactness, measured

Written by `make matrix`, that is by

    {command}

Forward and backward on every rank with a random upstream gradient, against dense attention in float64. The
error is the worst over out, dq, dk, dv and over ranks: its norm over the norm of the whole reference tensor
plus a thousandth of the upstream gradient's. Bytes are those that all ranks send together in a forward and a
backward pass, one number for each world. Heads are query heads / key and value heads.

{table}
"""


def page(command: str, verdicts: list[tuple[VerifyCase, Verdict]]) -> str:
    """Writes the page of the whole matrix, which ``command`` makes."""
    return PAGE.format(command=command, table=table(verdicts))


def table(verdicts: list[tuple[VerifyCase, Verdict]]) -> str:
    """Writes a Markdown table: one line for each strategy, layout, mask and head count, over all worlds.

    A strategy and layout that are refused throughout, for one reason, have a single line.
    """
    lines = [
        "| strategy | layout | mask | heads | worlds | worst error | bytes sent, by world | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (strategy, layout), group in itertools.groupby(verdicts, key=lambda pair: _row_key(pair[0])[:2]):
        pairs = list(group)
        reason, *others = {verdict.refused for _, verdict in pairs}
        if reason and not others:
            lines.append(f"| {strategy} | {layout} | all | all | all | | | refused: {reason} |")
            continue
        lines += [_line(list(row)) for _, row in itertools.groupby(pairs, key=lambda pair: _row_key(pair[0]))]
    return "\n".join(lines)


def _line(row: list[tuple[VerifyCase, Verdict]]) -> str:
    """Writes one line of the table: the same case on several worlds, of which some may be refused."""
    executed = [(case.world, verdict) for case, verdict in row if not verdict.refused]
    declined = [str(case.world) for case, verdict in row if verdict.refused]
    worst = max((max(verdict.errors.values()) for _, verdict in executed), default=None)
    said = ["exact" if all(verdict.passed for _, verdict in executed) else "**WRONG**"] if executed else []
    said += [f"refused on {', '.join(declined)}"] if declined else []
    columns = (
        *_row_key(row[0][0]),
        ", ".join(str(world) for world, _ in executed),
        "" if worst is None else f"{worst:.1e}",
        ", ".join(str(sum(verdict.bytes_forward + verdict.bytes_backward)) for _, verdict in executed),
        "; ".join(said),
    )
    return f"| {' | '.join(columns)} |"


def _row_key(case: VerifyCase) -> tuple[str, str, str, str]:
    parts = ["causal" if case.causal else "full"]
    parts += ["documents"] if case.documents else []
    parts += [f"window {case.window}"] if case.window else []
    return (
        " ".join(filter(None, (case.strategy, case.mixer))),
        case.layout,
        " + ".join(parts),
        f"{case.heads}/{case.kv_heads}",
    )
