"""Sums up a token file: how many documents of which lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from longctx.data.corpus import CHUNK, Int64

SUMMARY = ".tokens.json"  # ending of its file, beside the token file
_BUCKETS = 63


def histogram(lengths: Int64) -> list[dict[str, int]]:
    """Counts documents and their tokens by length, in buckets that double; empty documents are not counted."""
    documents, tokens = np.zeros(_BUCKETS, dtype=np.int64), np.zeros(_BUCKETS, dtype=np.int64)
    ends = np.left_shift(np.int64(1), np.arange(_BUCKETS, dtype=np.int64))  # 1, 2, 4, …: the first above each bucket
    for start in range(0, len(lengths), CHUNK):
        part = lengths[start : start + CHUNK]
        bucket = np.searchsorted(ends, part, side="right")
        documents += np.bincount(bucket, minlength=_BUCKETS)
        np.add.at(tokens, bucket, part)
    return [
        {"from": 1 << bucket - 1, "to": (1 << bucket) - 1, "documents": int(count), "tokens": int(tokens[bucket])}
        for bucket, count in enumerate(documents.tolist())
        if bucket and count
    ]


def lines(summary: dict[str, Any]) -> list[str]:
    """Writes a summary for people."""
    tokenizer, counted = summary["tokenizer"], summary["tokens"]
    marks = " and ".join(name.upper() for name in ("bos", "eos") if tokenizer.get(name)) or "neither BOS nor EOS"
    told = [
        f"{summary['documents']:,} documents, {counted:,} tokens of {summary['dtype']}, "
        f"{summary['text_bytes'] / max(1, counted):.2f} bytes of text a token; {marks} added",
        f"tokenizer {tokenizer['digest']}, {tokenizer['vocab_size']:,} ids",
    ]
    for key, what in (
        ("empty_documents", "documents are empty; they stay as boundaries, and training leaves them out"),
        ("emptied_documents", "documents had text of which the tokenizer made no token"),
        ("unknown_tokens", "tokens stand for text that the tokenizer does not know"),
    ):
        if summary[key]:
            told.append(f"{summary[key]:,} {what}")
    told += [f"tokenizer: {note}" for note in tokenizer.get("noted", [])]
    for key, what in (("left_out", "left out"), ("noted", "noted")):
        told += [f"{what}: {count:,} {words}" for words, count in summary["read"].get(key, {}).items()]
    return told


def table(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Writes the histogram as rows: lengths, documents, tokens, share of the tokens with a bar."""
    rows: list[tuple[str, ...]] = []
    for bucket in summary["lengths"]["histogram"]:
        share = bucket["tokens"] / summary["tokens"]
        span = f"{bucket['from']:,}–{bucket['to']:,}" if bucket["to"] > 1 else "1"
        bar = "█" * round(24 * share)
        rows.append((span, f"{bucket['documents']:,}", f"{bucket['tokens']:,}", f"{bar} {100 * share:.1f}%"))
    return rows
