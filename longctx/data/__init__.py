"""Turns text into whole packed sequences: sources, packing and the resumable loader."""

from longctx.data.balance import Balance
from longctx.data.corpus import Corpus
from longctx.data.loader import Loader
from longctx.data.packing import Packing
from longctx.data.source import open_corpus, preflight
from longctx.data.tokens import write_tokens

__all__ = ["Balance", "Corpus", "Loader", "Packing", "open_corpus", "preflight", "write_tokens"]
