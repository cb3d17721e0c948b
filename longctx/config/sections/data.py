"""Configures the data: which documents, packed to which length."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.catalog import SOURCES
from longctx.config.readers import for_some, refuse_unread
from longctx.errors import ConfigError
from longctx.rules import at_least, one_of

TOKEN_DTYPES = ("uint16", "uint32")
BALANCES = ("none", "rows", "documents")


@dataclass(frozen=True)
class DataConfig:
    """Says where documents come from and how long the packed sequences are."""

    source: str = "python_stdlib"
    path: str | None = for_some(None)
    seq_len: int = 1024
    text_key: str = for_some("text")  # field of a JSONL line that holds the text
    token_dtype: str = for_some("uint16")  # of a token file: uint16 or uint32
    max_documents: int | None = None  # take only the first so many documents
    balance: str = "none"  # even attention work: rows deals a step's rows by it, documents also packs by it

    def check(self) -> None:
        """Refuses sources without what they read, and options that the source would not read."""
        SOURCES.require(self.source)
        one_of("data.token_dtype", self.token_dtype, TOKEN_DTYPES)
        at_least("data.seq_len", self.seq_len, 1)
        at_least("data.max_documents", self.max_documents, 1)
        one_of("data.balance", self.balance, BALANCES)
        refuse_unread(self, "data", SOURCES, self.source, "data")
        if self.path is None and "path" in SOURCES.load(self.source).reads:
            raise ConfigError(f"data.path=null: data={self.source} reads a file or folder, set data.path")
