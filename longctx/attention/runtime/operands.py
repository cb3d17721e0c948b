"""Tensors among what an operator takes and returns, as a dispatch mode sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def tensors_in(*operands: Any) -> list[Tensor]:
    """Returns the tensors among arguments or results, in order; they nest in tuples, lists and dictionaries alone.

    torch's ``tree_leaves`` finds the same. In a mode that sees every operator it takes longer than the operators.
    """
    found: list[Tensor] = []
    for operand in operands:
        if isinstance(operand, Tensor):
            found.append(operand)
        elif isinstance(operand, tuple | list):
            if operand:
                found += tensors_in(*operand)
        elif isinstance(operand, dict) and operand:
            found += tensors_in(*operand.values())
    return found
