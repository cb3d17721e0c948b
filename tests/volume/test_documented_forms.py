"""The formulas of docs/attention.md, read from the page and evaluated, are what the strategies' closed forms give."""

import ast
import operator
import re
from fractions import Fraction
from pathlib import Path

import pytest

from longctx.attention.runtime.sizes import Sizes
from longctx.options import StrategyOptions
from longctx.sequence import Mask
from tests.volume.measure import ESTIMATED, LAYOUTS, costs, plan_of

PAGE = Path(__file__).parents[2] / "docs/attention.md"
ROW = re.compile(
    r"^\| `(\w+)`(?:, (kv|q|one group|two groups))?(?:, \w+ divides \w)? \| (\S.*) \| (\S.*) \|$", re.MULTILINE
)
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
# Those of which nothing wide travels but gradients, so that w = e is all that `grad_dtype=compute` changes.
GRADIENTS_ALONE = {("ring", ""), ("gather", ""), ("burst", "kv"), ("usp", "")}


def value(formula: str, names: dict[str, int]) -> Fraction:
    """Of a formula as printed: 2(P−1)·n is 2 * (P - 1) * n."""
    plain = re.sub(r"([\d)])(?=[(A-Za-z])", r"\1*", formula.replace("−", "-").replace("·", "*"))

    def of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Call):
            return max(map(of, node.args))  # the only function that the page uses
        return Fraction(names[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node))

    return of(ast.parse(plain, mode="eval").body)


def documented() -> list[tuple[str, str, str, str]]:
    """(strategy, what travels backward, bytes forward, backward) without a mask."""
    return [row for row in ROW.findall(PAGE.read_text(encoding="utf-8")) if "(P−1)" in row[2] or "(P/u−1)" in row[2]]


def test_every_strategy_that_sends_is_there():
    # What disaggregated attention sends is what its planner has assigned.
    assert {row[0] for row in documented()} == set(ESTIMATED) - {
        "local",
        "striped",
        "disaggregated",
        "zeppelin",
    }


@pytest.mark.parametrize(("strategy", "side", "forward", "backward"), documented())
@pytest.mark.parametrize(("h", "k"), [(16, 16), (16, 8)])
@pytest.mark.parametrize(("world", "inner"), [(2, 2), (4, 2), (8, 4)])
def test_it_is_what_the_closed_form_gives(strategy, side, forward, backward, h, k, world, inner):
    n, dim, element = 32, 8, 2
    plan = plan_of([(n * world,)], Mask(False), LAYOUTS["zigzag"], n * world, world)
    row = world if strategy == "ulysses" else inner
    for grad_dtype, wide in (("fp32", 4), ("compute", 2)):
        if grad_dtype == "compute" and (strategy, side) not in GRADIENTS_ALONE:
            continue
        sizes = Sizes(1, h, k, dim, element, 4, row, StrategyOptions(grad_dtype, side or "auto"))
        names = {"P": world, "n": n, "h": h, "k": k, "D": dim, "e": element, "w": wide, "u": row}
        for rank in range(world):
            volume = costs(strategy).volume(plan, rank, sizes)
            assert (volume.forward, volume.backward) == (value(forward, names), value(backward, names))
