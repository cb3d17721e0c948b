"""Head sharding of Ulysses: which heads each rank of a row computes, and in which groups.

Each of the ranks of a row has an equal share of the query heads. All ranks compute the same; ``runtime.all_to_all``
sends accordingly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longctx.sequence import SequencePlan


@dataclass(frozen=True)
class HeadSplit:
    """Splits heads over ranks; query head h reads key/value head ``h * kv_heads // heads``."""

    heads: int
    kv_heads: int
    ranks: int

    @property
    def queries(self) -> int:
        """Returns how many query heads every rank has."""
        return self.heads // self.ranks

    def query_heads(self, rank: int) -> slice:
        """Returns the query heads of a rank."""
        return slice(rank * self.queries, (rank + 1) * self.queries)

    def key_heads(self, rank: int) -> slice:
        """Returns the key/value heads that a rank's query heads read; ranks share heads where there are few."""
        own = self.query_heads(rank)
        return slice(own.start * self.kv_heads // self.heads, (own.stop - 1) * self.kv_heads // self.heads + 1)

    def keys(self, rank: int) -> int:
        """Returns how many key/value heads a rank's query heads read."""
        own = self.key_heads(rank)
        return own.stop - own.start

    def copies(self, rank: int) -> list[int] | None:
        """Returns the key/value head that each query head reads, where a kernel would not find it by itself.

        Each query head then gets a copy. None: no copies are needed. Heads count from the rank's first of
        ``key_heads``.
        """
        own, first = self.query_heads(rank), self.key_heads(rank).start
        read = [head * self.kv_heads // self.heads - first for head in range(own.start, own.stop)]
        count = self.keys(rank)
        fits = self.queries % count == 0 and all(key == i * count // self.queries for i, key in enumerate(read))
        return None if fits else read

    def local_keys(self, rank: int) -> int:
        """Returns how many key/value heads the rank's kernel sees."""
        return self.keys(rank) if self.copies(rank) is None else self.queries


GROUPS = 2  # of a rank's heads: while one computes, the next arrives and results of the one before return


@dataclass(frozen=True)
class HeadGroups:
    """Divides the heads of each of ``ranks`` into ``count`` groups.

    ``split``: among all groups of all ranks.
    """

    ranks: int
    count: int
    split: HeadSplit

    @classmethod
    def of(cls, heads: int, kv_heads: int, ranks: int) -> HeadGroups:
        """Returns as many groups as there may be without sending a key/value head to one rank twice."""
        # Every call of attention asks. The compiler may ask for symbols, and heads are none.
        return cls._of(int(heads), int(kv_heads), ranks)

    @classmethod
    @lru_cache(maxsize=64)
    def _of(cls, heads: int, kv_heads: int, ranks: int) -> HeadGroups:

        def split(count: int) -> HeadSplit:
            return HeadSplit(heads, kv_heads, ranks * count)

        def once(count: int) -> bool:
            return heads % (ranks * count) == 0 and all(
                sum(split(count).keys(rank * count + group) for group in range(count)) == split(1).keys(rank)
                for rank in range(ranks)
            )

        count = next(count for count in range(GROUPS, 0, -1) if count == 1 or once(count))
        return cls(ranks, count, split(count))

    def part(self, rank: int, group: int) -> int:
        """Returns the number in ``split`` of a rank's group."""
        return rank * self.count + group

    def query_heads(self, rank: int, group: int) -> slice:
        """Returns the query heads of a rank's group."""
        return self.split.query_heads(self.part(rank, group))

    def key_heads(self, rank: int, group: int) -> slice:
        """Returns the key/value heads that a rank's group reads."""
        return self.split.key_heads(self.part(rank, group))

    def copies(self, rank: int, group: int) -> list[int] | None:
        """Returns what ``HeadSplit.copies`` says of a rank's group."""
        return self.split.copies(self.part(rank, group))

    @property
    def shared(self) -> bool:
        """Returns whether ranks share key/value heads."""
        return sum(map(self.split.keys, range(self.split.ranks))) > self.split.kv_heads


def work_in_rows(plan: SequencePlan, rank: int, inner: int) -> float:
    """Returns the cells that a rank computes for all queries of its row, as a share of all heads.

    Ranks of a row compute for all its queries, each in its own heads.
    """
    return plan.joined(inner).work(rank // inner) / inner
