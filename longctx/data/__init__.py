"""Turns text into whole packed sequences: sources, packing and the resumable loader.

What opens a corpus needs no torch. ``loader`` and ``packing`` do, and are imported by their own names.
"""

from longctx.data.balance import Balance
from longctx.data.corpus import Corpus
from longctx.data.source import open_corpus, preflight
from longctx.data.tokens import write_tokens

__all__ = ["Balance", "Corpus", "open_corpus", "preflight", "write_tokens"]
