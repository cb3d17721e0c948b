"""Finds the documents, positions and shifted labels of a whole batch, as ``transformers`` means them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longctx.errors import DataError
from longctx.sequence import IGNORE, Documents
from longctx.sequence.documents import Int64

# Lengths of documents for all rows, or for each row; or the documents of each row.
Packed = Sequence[int] | Sequence[Sequence[int]] | Documents | Sequence[Documents]


@dataclass(frozen=True)
class PackedRows:
    """Holds what is known of whole rows ``[B, S]``: documents, positions for RoPE, labels after the shift."""

    documents: tuple[Documents, ...]
    positions: Int64
    labels: Int64


def packed_rows(
    input_ids: Tensor,
    labels: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    documents: Packed | None,
) -> PackedRows:
    """Returns documents, positions and shifted labels of a batch. Raises ``DataError`` for what contradicts itself."""
    _require_ids("input_ids", input_ids, input_ids)
    rows, length = input_ids.shape
    if not rows or not length:
        raise DataError(f"input_ids {tuple(input_ids.shape)} hold no token; a batch has one at least")
    mask = None if attention_mask is None else _mask(attention_mask, input_ids)
    positions = None if position_ids is None else _positions(position_ids, input_ids)
    known = None if documents is None else _documents(documents, rows, length)
    if known is not None and mask is not None:
        raise DataError("documents and an attention_mask with zeros both say what is padding; leave out the mask")
    found = []
    for row in range(rows):
        span = (0, length) if mask is None else _span(mask[row], row)
        restarts = np.empty(0, np.int64) if positions is None else _restarts(positions[row], *span)
        if known is not None:
            found.append(_agreeing(known[row], restarts, row))
        elif len(restarts) and attention_mask is not None:
            raise DataError(
                f"position_ids of row {row} begin anew at token {restarts[0]}, and there is an attention_mask: with "
                "one, transformers lets packed documents see each other; leave out attention_mask, or give documents="
            )
        else:
            found.append(_documents_of(span, restarts))
    return PackedRows(
        tuple(found),
        _own_positions(found, length, known is not None) if positions is None else positions,
        _shifted(input_ids, labels, mask, found),
    )


def _require_ids(name: str, ids: Tensor, like: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError(f"{name} are {given}; they must be a torch.Tensor [B, S] of int64, of whole rows")
    if ids.shape != like.shape:
        raise DataError(f"{name} {tuple(ids.shape)} must be as input_ids are, {tuple(like.shape)}")


def _mask(mask: Tensor, input_ids: Tensor) -> np.ndarray | None:
    """A padding mask as booleans ``[B, S]``; None where it hides nothing."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        given = f"{tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise DataError(
            f"attention_mask is {given}; it must be [B, S] with zeros for padding. Documents are given by position_ids "
            "or documents=, windows by the model; other masks are not cut"
        )
    if mask.shape != input_ids.shape:
        raise DataError(f"attention_mask {tuple(mask.shape)} must be as input_ids are, {tuple(input_ids.shape)}")
    values = mask.detach().cpu().numpy()
    if not np.isin(values, (0, 1)).all():
        raise DataError("attention_mask must hold zeros, for padding, and ones; give documents by documents=")
    return None if (values != 0).all() else values != 0


def _positions(position_ids: Tensor, input_ids: Tensor) -> Int64:
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and len(position_ids) == 1:
        position_ids = position_ids.expand(len(input_ids), -1)
    _require_ids("position_ids", position_ids, input_ids)
    return position_ids.detach().cpu().numpy().astype(np.int64)


def _documents(given: Packed, rows: int, length: int) -> list[Documents]:
    if isinstance(given, Documents):
        found = [given] * rows
    else:
        parts = list(given)
        if parts and all(isinstance(one, Documents) for one in parts):
            found = list(parts)  # type: ignore[arg-type]
        elif parts and all(isinstance(one, Sequence) and not isinstance(one, str) for one in parts):
            found = [Documents.from_lengths(one) for one in parts]  # type: ignore[arg-type]
        else:
            found = [Documents.from_lengths(parts)] * rows  # type: ignore[arg-type]
    if len(found) != rows:
        raise DataError(f"documents are those of {len(found)} rows, and the batch has {rows}")
    for row, one in enumerate(found):
        if one.length > length:
            raise DataError(f"documents of row {row} have {one.length} tokens and must fit in its {length}")
    return found


def _span(mask: np.ndarray, row: int) -> tuple[int, int]:
    """First and last + 1 of the tokens that are no padding."""
    kept = np.flatnonzero(mask)
    if not len(kept):
        return 0, 0
    first, stop = int(kept[0]), int(kept[-1]) + 1
    if len(kept) != stop - first:
        hole = first + int(np.flatnonzero(~mask[first:stop])[0])
        raise DataError(
            f"attention_mask of row {row} hides token {hole} between others; padding must be before or after all tokens"
        )
    return first, stop


def _restarts(positions: Int64, first: int, stop: int) -> Int64:
    """Tokens whose position does not follow that of the token before: there ``transformers`` begins a document."""
    return first + 1 + np.flatnonzero(np.diff(positions[first:stop]) != 1)


def _agreeing(documents: Documents, restarts: Int64, row: int) -> Documents:
    inside = restarts[restarts < documents.length]
    other = np.setdiff1d(inside, documents.cu_seqlens)
    if len(other):
        raise DataError(
            f"position_ids of row {row} begin anew at token {other[0]}, where no document of {documents!r} does; "
            "leave out documents= to find them by position_ids"
        )
    return documents


def _documents_of(span: tuple[int, int], restarts: Int64) -> Documents:
    first, stop = span
    bounds = np.unique(np.concatenate([[0, first, stop], restarts]))
    # Padding before the first token is a document of its own, which nobody else sees.
    return Documents(bounds[bounds <= stop].astype(np.int64))


def _own_positions(documents: Sequence[Documents], length: int, packed: bool) -> Int64:
    """Positions where none are given: from each given document's start, else from the row's."""
    every = np.arange(length, dtype=np.int64)
    return np.stack([every - one.bounds_of(every)[0] if packed else every for one in documents])


def _shifted(
    input_ids: Tensor, labels: Tensor | None, mask: np.ndarray | None, documents: Sequence[Documents]
) -> Int64:
    """Labels of the token after each in its own document; ``IGNORE`` for a document's last, and padding."""
    if labels is not None:
        _require_ids("labels", labels, input_ids)
    own = (input_ids if labels is None else labels).detach().cpu().numpy().astype(np.int64)
    if mask is not None:
        if labels is not None and (own[~mask] != IGNORE).any():
            raise DataError(f"labels of tokens that attention_mask hides must be {IGNORE}; padding predicts nothing")
        own = np.where(mask, own, IGNORE)
    shifted = np.full_like(own, IGNORE)
    shifted[:, :-1] = own[:, 1:]
    for row, one in enumerate(documents):
        shifted[row, one.cu_seqlens[1:] - 1] = IGNORE
        shifted[row, one.length :] = IGNORE
    return shifted
