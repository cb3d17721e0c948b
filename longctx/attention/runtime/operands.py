"""What an operator takes and returns, as a dispatch mode sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def tensors_in(*operands: Any) -> Iterator[Tensor]:
    """Tensors among arguments or results, in order; they nest in tuples, lists and dictionaries alone.

    torch's ``tree_leaves`` finds the same; in a mode that sees every operator it takes longer than the operators.
    """
    for operand in operands:
        if isinstance(operand, Tensor):
            yield operand
        elif isinstance(operand, tuple | list):
            yield from tensors_in(*operand)
        elif isinstance(operand, dict):
            yield from tensors_in(*operand.values())
