"""Sets of local rows: what a message carries when only part of a shard is needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Holds a set of local rows as sorted, disjoint, non-touching half-open intervals."""

    intervals: tuple[tuple[int, int], ...] = ()

    @classmethod
    def union(cls, intervals: Iterable[tuple[int, int]]) -> Rows:
        """Makes the set of all rows of these intervals, which may overlap."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(span for span in intervals if span[0] < span[1]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return cls(tuple(merged))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Returns where each interval begins in a packed buffer."""
        lengths = [stop - start for start, stop in self.intervals]
        return tuple(sum(lengths[:i]) for i in range(len(lengths)))

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.intervals)

    def __or__(self, other: Rows) -> Rows:
        return Rows.union(self.intervals + other.intervals)

    def __sub__(self, other: Rows) -> Rows:
        kept: list[tuple[int, int]] = []
        for start, stop in self.intervals:
            for cut_start, cut_stop in other.intervals:
                if cut_stop <= start or cut_start >= stop:
                    continue
                if start < cut_start:
                    kept.append((start, cut_start))
                start = cut_stop
            if start < stop:
                kept.append((start, stop))
        return Rows(tuple(kept))

    def locate(self, start: int, stop: int) -> int:
        """Returns where rows ``[start, stop)`` lie in a packed buffer of this set; they are in one interval of it."""
        for (low, high), offset in zip(self.intervals, self.offsets, strict=True):
            if low <= start and stop <= high:
                return offset + start - low
        raise AssertionError(f"rows [{start}, {stop}) are not within {self.intervals}")

    def inside(self, outer: Rows) -> Rows:
        """Returns this subset of ``outer``, numbered by place in a packed buffer of ``outer``."""
        starts = [outer.locate(start, stop) for start, stop in self.intervals]
        return Rows.union(
            (place, place + stop - start) for place, (start, stop) in zip(starts, self.intervals, strict=True)
        )

    def take(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Returns these rows of ``tensor`` along ``dim``, packed: a view for one interval, a copy for several."""
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in self.intervals]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)

    def put(self, tensor: Tensor, packed: Tensor, dim: int = 1) -> None:
        """Writes ``packed`` to these rows of ``tensor``."""
        for (start, stop), offset in zip(self.intervals, self.offsets, strict=True):
            tensor.narrow(dim, start, stop - start).copy_(packed.narrow(dim, offset, stop - start))

    def add_to(self, tensor: Tensor, packed: Tensor, dim: int = 1) -> None:
        """Adds ``packed`` to these rows of ``tensor``, in place."""
        for (start, stop), offset in zip(self.intervals, self.offsets, strict=True):
            tensor.narrow(dim, start, stop - start).add_(packed.narrow(dim, offset, stop - start))
