"""Packs documents into samples of constant length: a pure function of (corpus, seed, sample index).

The stream. Each epoch lists all documents in a permutation drawn from (seed, epoch). The epochs follow one another
without end, and row r is tokens ``[r * S, (r + 1) * S)`` of that stream. So every token is used exactly once per
epoch, and nothing is dropped or padded. A row may hold the end of one epoch and the start of the next, or several
whole ones when the corpus is shorter than S.

The order. Rows are read shuffled, within windows of as many rows as an epoch fills, or ``MOST_ROWS``. Otherwise one
long document would be all that a run sees for many steps. No sample depends on how many ranks there are or on what was
read before.

Packed for even work (``data.balance=documents``). The stream is taken 64 rows at a time and their documents are packed
anew (``balance``). These rows are read shuffled: every token once per epoch, the same for every mesh.

The cut. A document that crosses the end of a sample is split; what follows is a document of its own in the
next sample. Labels are shifted before the cut: the last token of a sample is still taught the token that
comes next in its document.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from longctx.config.sections.data import SKIP, SPLIT, TRUNCATE
from longctx.data.balance import STREAM, WINDOW, Balance, Piece, pack_pieces
from longctx.data.corpus import Corpus, Int64
from longctx.errors import ConfigError
from longctx.sequence import IGNORE, Documents

_ROWS = 2**32  # in a seed, sets the permutations of rows apart from those of an epoch's documents
MOST_ROWS = 1 << 18  # that are shuffled together: more would take long to draw, and much memory
KEPT_EPOCHS = 2  # permutations kept: a sample rarely spans more than two epochs


@dataclass(frozen=True)
class Epoch:
    """One pass over the corpus, which lists its documents in a drawn order.

    ``order``: int64 ``[D]``, documents in order; ``starts``: int64 ``[D + 1]``, where each starts.
    """

    number: int
    order: Int64
    starts: Int64


class Packing:
    """Cuts samples of ``seq_len`` tokens from ``corpus``.

    With ``document_mask`` off a row is announced as one document, so attention and positions run across the boundaries.
    Labels are the same either way: the first token of a document drawn at random cannot be predicted from the one
    before. So the loss counts the same tokens. ``balance``: how attention work is evened out, None for not at all.
    ``chosen``: numbers of the documents to pack, int64, ascending; None for all of them. One that stands there twice
    comes twice an epoch. ``long_documents``: what becomes of those longer than
    ``seq_len`` (``longctx.data.long_documents``).
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        seed: int,
        document_mask: bool = True,
        balance: Balance | None = None,
        chosen: Int64 | None = None,
        long_documents: str = SPLIT,
    ) -> None:
        if seq_len < 1:
            raise ConfigError(f"data.seq_len={seq_len}: a sequence has at least 1 token")
        if seed < 0:
            raise ConfigError(f"train.seed={seed}: seeds are not negative; set train.seed={-seed} or 0")
        self.corpus = corpus
        self.seq_len = seq_len
        self.seed = seed
        self.document_mask = document_mask
        self.balance = balance
        self.chosen = chosen
        self.long_documents = long_documents
        self._documents = chosen
        self.epoch_tokens = corpus.total_tokens
        if chosen is not None or long_documents != SPLIT:
            lengths = corpus.lengths if chosen is None else corpus.lengths_of(chosen)
            self.epoch_tokens = int(self._used(lengths).sum())
            if long_documents == SKIP:
                self._documents = self._short(lengths)
        self._epochs: tuple[Epoch, ...] = ()
        self._packed: tuple[int, list[list[Piece]]] | None = None
        self._window: tuple[int, Int64] | None = None

    @property
    def epoch_rows(self) -> Fraction:
        """Rows that an epoch fills."""
        return Fraction(self.epoch_tokens, self.seq_len)

    @property
    def documents(self) -> int:
        """Documents of an epoch; one that comes twice counts twice."""
        return len(self.corpus) if self._documents is None else len(self._documents)

    @property
    def order(self) -> str:
        """The name that a checkpoint gives to how documents become samples."""
        name = self.balance.packing if self.balance else STREAM
        if self.long_documents != SPLIT:
            name += f", data.long_documents={self.long_documents}"
        return name if self.epoch_rows < MOST_ROWS + 1 else f"{name}, shuffled {MOST_ROWS} rows at a time"

    def sample(self, index: int) -> tuple[Int64, Int64, Documents]:
        """Returns tokens int64 ``[S]``, labels int64 ``[S]`` (``IGNORE`` at a document's end), and the documents.

        ``index``: global number of the sample, from 0 and without end; the cost does not grow with it.
        Raises ``DataError`` when a token is outside the vocabulary.
        """
        return self._filled(self.pieces(index))

    def work(self, index: int) -> int:
        """Returns what attention costs for a sample, in (query, key) pairs of a layer."""
        assert self.balance is not None, "work is counted where it is balanced"
        return int(self.balance.cells(self.lengths(index)).sum())

    def lengths(self, index: int) -> Int64:
        """Returns the tokens of each of a sample's documents, int64 ``[D]``."""
        return np.array([stop - start for start, stop, _ in self.pieces(index)], dtype=np.int64)

    def pieces(self, index: int) -> list[Piece]:
        """Returns the pieces of documents that a sample is made of."""
        assert index >= 0, "samples are counted from 0"
        if self.balance is None or not self.balance.documents:
            return self._stream(self.row_of(index), 1)
        window, place = divmod(index, WINDOW)
        if self._packed is None or self._packed[0] != window:
            rows = pack_pieces(self._stream(window * WINDOW, WINDOW), WINDOW, self.seq_len, self.balance)
            order = _permutation(WINDOW, self.seed, _ROWS, window)
            self._packed = (window, [rows[row] for row in order.tolist()])
        return self._packed[1][place]

    def row_of(self, index: int) -> int:
        """Returns which row of the stream is the sample of that number; a permutation within each window of rows."""
        rows = min(max(1, self.epoch_tokens // self.seq_len), MOST_ROWS)
        window, place = divmod(index, rows)
        if self._window is None or self._window[0] != window:
            self._window = (window, _permutation(rows, self.seed, _ROWS, window))
        order = self._window[1]
        return window * len(order) + int(order[place])

    def row(self, index: int) -> tuple[Int64, Int64, Documents]:
        """Returns row ``index`` of the stream, as ``sample`` does."""
        return self._filled(self._stream(index, 1))

    def _filled(self, pieces: list[Piece]) -> tuple[Int64, Int64, Documents]:
        tokens = np.empty(self.seq_len, dtype=np.int64)
        labels = np.empty(self.seq_len, dtype=np.int64)
        filled = 0
        for start, stop, end in pieces:
            into = slice(filled, filled + stop - start)
            read = self.corpus.read(start, min(stop + 1, end))
            tokens[into] = read[: stop - start]
            following = read[1:]
            labels[filled : filled + len(following)] = following
            if self.corpus.learned is not None:
                learned = self.corpus.learned(start + 1, min(stop + 1, end))
                labels[filled : filled + len(following)][~learned] = IGNORE
            filled += stop - start
            if stop == end:
                labels[filled - 1] = IGNORE
        self._check(tokens, labels, pieces)
        lengths = (stop - start for start, stop, _ in pieces)
        documents = Documents.from_lengths(lengths) if self.document_mask else Documents.single(self.seq_len)
        return tokens, labels, documents

    def _stream(self, first: int, rows: int) -> list[Piece]:
        """Returns the documents of so many rows of the stream; those that cross its two ends are cut there."""
        position, missing = first * self.seq_len, rows * self.seq_len
        pieces: list[Piece] = []
        while missing:
            number, offset = divmod(position, self.epoch_tokens)
            epoch = self._epoch(number)
            take = min(missing, self.epoch_tokens - offset)
            first = int(np.searchsorted(epoch.starts, offset, side="right")) - 1
            last = int(np.searchsorted(epoch.starts, offset + take, side="left"))
            documents = epoch.order[first:last]
            begins = self.corpus.bounds[documents]
            ends = begins + self._used(self.corpus.lengths_of(documents))
            starts, stops = begins.copy(), ends.copy()
            starts[0] += offset - epoch.starts[first]
            stops[-1] = begins[-1] + offset + take - epoch.starts[last - 1]
            pieces += zip(starts.tolist(), stops.tolist(), ends.tolist(), strict=True)
            position, missing = position + take, missing - take
        return pieces

    def _short(self, lengths: Int64) -> Int64:
        """Returns the numbers of those of the chosen documents that a sequence holds whole."""
        kept = np.flatnonzero(lengths <= self.seq_len)
        if lengths[kept].max(initial=0) <= 1:
            raise ConfigError(
                f"data.long_documents=skip leaves nothing to learn of {self.corpus.source}: {len(kept)} of "
                f"{len(lengths)} documents are not longer than data.seq_len={self.seq_len}, and none of them has two "
                "tokens; set data.long_documents=truncate, or a larger data.seq_len"
            )
        return kept if self.chosen is None else self.chosen[kept]

    def _used(self, lengths: Int64) -> Int64:
        return used(self.long_documents, lengths, self.seq_len)

    def _epoch(self, number: int) -> Epoch:
        for kept in self._epochs:
            if kept.number == number:
                return kept
        order = _permutation(self.documents, self.seed, number)
        order = order if self._documents is None else self._documents[order]
        starts = np.concatenate([[0], np.cumsum(self._used(self.corpus.lengths_of(order)))]).astype(
            np.int64, copy=False
        )
        epoch = Epoch(number, order, starts)
        self._epochs = (*self._epochs[1 - KEPT_EPOCHS :], epoch)
        return epoch

    def _check(self, tokens: Int64, labels: Int64, pieces: list[Piece]) -> None:
        """Checks that no id outside the vocabulary reaches the model, even if the file changed after it was opened."""

        def positions(offset: int) -> int:
            return int(np.concatenate([np.arange(start, stop) for start, stop, _ in pieces])[offset])

        self.corpus.check_ids(tokens, positions)
        self.corpus.check_ids(np.where(labels == IGNORE, 0, labels), lambda offset: positions(offset) + 1)


def used(policy: str, lengths: Int64, seq_len: int) -> Int64:
    """Returns how many tokens of documents of these lengths are trained on, from their beginning on."""
    if policy == SPLIT:
        return lengths
    return np.minimum(lengths, seq_len) if policy == TRUNCATE else np.where(lengths > seq_len, 0, lengths)


def _permutation(length: int, *seed: int) -> Int64:
    """Draws a permutation of ``range(length)``, int64, from ``seed``.

    It takes raw words of a bit generator and a stable sort. Unlike Generator.permutation, numpy promises that these
    never change between versions.
    """
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(length)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)
