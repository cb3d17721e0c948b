"""Configures the data: which documents, packed to which length."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from longctx.catalog import SOURCES
from longctx.config.readers import FOR_SOME, default_of, for_some, refuse_unread
from longctx.config.sections.mixture import WEIGHTS, MixtureSource
from longctx.errors import ConfigError
from longctx.rules import as_word, at_least, one_of, within

TOKEN_DTYPES = ("uint16", "uint32")
BALANCES = ("none", "rows", "documents")
LONG_DOCUMENTS = (SPLIT, TRUNCATE, SKIP) = ("split", "truncate", "skip")
SPECIAL_TOKENS = ("text", "ids")


@dataclass(frozen=True)
class ValidationConfig:
    """Says which documents are held out of training, and when the loss on them is measured."""

    fraction: float = 0.0  # of the corpus's documents; 0: none
    path: str | None = None  # documents of their own, which the run's source reads; null: none
    every: int = 100  # steps between validations; 0: only at the end
    sequences: int | None = 64  # how many a validation takes at most; null: all that there are

    @property
    def wanted(self) -> bool:
        """Whether the run validates at all."""
        return self.path is not None or self.fraction > 0

    def check(self) -> None:
        """Refuses two sets of documents, and settings of a validation that is not done."""
        within("data.validation.fraction", self.fraction, 0.0, 1.0, open_end=True)
        at_least("data.validation.every", self.every, 0)
        at_least("data.validation.sequences", self.sequences, 1)
        if self.path is not None and self.fraction:
            raise ConfigError(
                f"data.validation.fraction={self.fraction} holds out documents of the corpus, and "
                f"data.validation.path={self.path} names others; set one of them"
            )
        for name in ("every", "sequences"):
            value, default = getattr(self, name), getattr(ValidationConfig, name)
            if value != default and not self.wanted:
                raise ConfigError(
                    f"data.validation.{name}={as_word(value)} is of a validation, and none is asked for; set "
                    "data.validation.fraction=0.01, or data.validation.path"
                )


@dataclass(frozen=True)
class DataConfig:
    """Says where documents come from and how long the packed sequences are."""

    source: str = "python_stdlib"
    path: str | None = for_some(None)
    seq_len: int = 1024
    text_key: str = for_some("text")  # field of a JSONL line, or column, that holds the text or the ids
    files: str | None = for_some(None)  # patterns of a folder's files to read, such as "*.md *.txt"; null: all
    split: str | None = for_some(None)  # which dataset of a folder that holds several
    tokenizer: str | None = for_some(None)  # a folder with tokenizer.json, or that file; null: bytes
    bos: bool = for_some(False)  # begin each document with the tokenizer's BOS
    eos: bool = for_some(False)  # end each document with its EOS
    special_tokens: str = for_some("text")  # read special tokens that stand in a document as text, or as their ids
    token_dtype: str = for_some("uint16")  # of a token file: uint16 or uint32
    recheck: bool = for_some(False)  # check a token file whole at every start, even if it is unchanged
    max_documents: int | None = None  # take only the first so many documents
    balance: str = "none"  # even attention work: rows deals a step's rows by it, documents also packs by it
    long_documents: str = SPLIT  # of more than seq_len tokens: split them, keep their beginning, or leave them out
    mixture: dict[str, MixtureSource] = field(default_factory=dict, metadata=FOR_SOME)  # sources by name
    weights: str = for_some("tokens")  # what the weights of a mixture are shares of: tokens or documents
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> None:
        """Refuses sources without what they read, and options that the source would not read."""
        SOURCES.require(self.source)
        one_of("data.token_dtype", self.token_dtype, TOKEN_DTYPES)
        at_least("data.seq_len", self.seq_len, 1)
        at_least("data.max_documents", self.max_documents, 1)
        one_of("data.balance", self.balance, BALANCES)
        one_of("data.long_documents", self.long_documents, LONG_DOCUMENTS)
        if self.long_documents != SPLIT and self.seq_len == 1:
            raise ConfigError(
                f"data.long_documents={self.long_documents} leaves no label at data.seq_len=1; set data.seq_len=2 or "
                "more, or data.long_documents=split"
            )
        one_of("data.weights", self.weights, WEIGHTS)
        self.validation.check()
        refuse_unread(self, "data", SOURCES, self.source, "data")
        one_of("data.special_tokens", self.special_tokens, SPECIAL_TOKENS)
        for name in ("bos", "eos", "special_tokens"):
            value = getattr(self, name)
            if self.tokenizer is None and value != getattr(DataConfig, name):
                raise ConfigError(
                    f"data.{name}={as_word(value)} is of a tokenizer, and bytes have no special tokens; set "
                    f"data.tokenizer=DIR, or leave it at {as_word(getattr(DataConfig, name))}"
                )
        reads = SOURCES.load(self.source).reads
        if self.validation.path is not None and "path" not in reads:
            raise ConfigError(
                f"data.validation.path={self.validation.path} is read as data.path is, and data={self.source} reads no "
                "path; hold out documents by data.validation.fraction=0.01"
            )
        if self.validation.path is not None and self.validation.path == self.path:
            raise ConfigError(
                f"data.validation.path={self.path} is what the run trains on; name other documents, or hold some "
                "out by data.validation.fraction=0.01"
            )
        if self.path is None and "path" in reads:
            raise ConfigError(f"data.path=null: data={self.source} reads a file or folder, set data.path")
        if "mixture" in reads:
            self._check_mixture()

    def _check_mixture(self) -> None:
        """Refuses a mixture of nothing, and each source as the section ``data`` would be refused."""
        for name, one in self.mixture.items():
            one.check(name)
            if one.source == self.source:
                raise ConfigError(f"data.mixture.{name}.source=mixture: a mixture holds no mixtures; name its sources")
            try:
                self.of_source(name).check()
            except ConfigError as error:
                raise ConfigError(f"data.mixture.{name}, read as a section data of its own: {error}") from None
        if not any(one.weight for one in self.mixture.values()):
            raise ConfigError(
                "data=mixture has no source of a weight above 0; set data.mixture.NAME.path=… for each, as in "
                "data.mixture.code.path=code.bin data.mixture.code.source=tokens data.mixture.code.weight=0.3"
            )
        if self.max_documents is not None:
            name = next(iter(self.mixture))
            raise ConfigError(
                f"data.max_documents={self.max_documents} is of one source; set data.mixture.{name}.max_documents"
            )

    def of_source(self, name: str) -> DataConfig:
        """Returns the section ``data`` by which one source of the mixture is read."""
        one = self.mixture[name]
        SOURCES.require(one.source)
        own = {key.name: getattr(one, key.name) for key in fields(one) if key.name in _OF_READING}
        reads = SOURCES.load(one.source).reads
        unread = {
            key.name: default_of(key)
            for key in fields(self)
            if key.metadata.get("for_some") and key.name not in {*reads, *own}
        }
        return replace(self, validation=ValidationConfig(), **unread, **own)


# What a source of a mixture says for itself; the rest of the section is the same for all.
_OF_READING = frozenset(key.name for key in fields(MixtureSource)) & {key.name for key in fields(DataConfig)}
