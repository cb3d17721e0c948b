"""Streams tensors into a safetensors file: its header first, then one tensor after another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Entry = tuple[str, str, tuple[int, ...], int]  # name, dtype by its code, shape, bytes


def header_of(entries: Iterable[Entry], metadata: dict[str, str] | None = None) -> bytes:
    """Returns what stands before tensors that follow in this order, with its length and padded to 8 bytes."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yields the bytes of a tensor, where it has any."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        yield flat.view(torch.uint8).numpy().data
