"""Turns text into ids and back: by the ``tokenizer.json`` of a model, or byte by byte.

Text is text. Special tokens that stand written in a document are read as the characters they are, unless
``special_tokens="ids"``; BOS and EOS come from the policy and nowhere else. What a tokenizer would lose in silence, or
what would make a special id of plain text, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longctx.data.files import printable
from longctx.data.tokenizing.alphabet import alphabet_of
from longctx.data.tokenizing.definition import Definition, find_file, kinds_in, read_definition
from longctx.data.tokenizing.long_text import PIECE, encode_long
from longctx.errors import ConfigError, DataError, NotAvailableError

Ids = NDArray[np.uint32]
Origin = Callable[[int], str]

BYTES = "bytes"  # names the tokenizer of bytes
BYTE_IDS = 256
_MOST_IDS = 1 << 24  # the largest vocabularies have some hundred thousand
_PROBE = "Zwölf Boxkämpfer: 12 € \t für\n\n  「尺八」 e\u0301 🎋 <|x|>"


@dataclass(frozen=True)
class Policy:
    """Says what stands around the ids of a document, and how special tokens that are written in it are read.

    ``special_tokens``: "text" reads them as any characters, "ids" as what they name.
    """

    bos: bool = False
    eos: bool = False
    special_tokens: str = "text"


class Tokenizer(Protocol):
    """Promises what every tokenizer does.

    ``vocab_size``: one more than its largest id. ``unknown``: the id that stands for what it does not know, if any.
    ``eos_ids``: tokens at which generation stops. ``digest``: names what determines the ids of a document, policy
    included; ``content``: without the policy.
    """

    policy: Policy
    vocab_size: int
    unknown: int | None
    content: str

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def digest(self) -> str: ...

    def encode_documents(self, texts: Sequence[str | bytes], origin: Origin = str) -> list[Ids]:
        """Returns the ids of each document; ``origin(i)`` names one in messages. An empty document has none.

        Raises ``DataError`` naming document and place.
        """

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of ids; what is no whole character becomes U+FFFD."""

    def facts(self) -> dict[str, Any]:
        """Returns what a run tells of it, as JSON values."""


def open_tokenizer(path: str | Path | None, policy: Policy = Policy()) -> Tokenizer:
    """Opens the tokenizer of a folder or ``tokenizer.json``; None and "bytes" are the bytes themselves.

    Raises ``ConfigError`` for what is no such place and for a policy that it cannot keep, ``DataError`` for damaged
    files, ``NotAvailableError`` without the library.
    """
    if path is None or str(path) == BYTES:
        return ByteTokenizer(policy)
    return FileTokenizer(read_definition(find_file(path)), policy)


def require_ids(tokenizer: Tokenizer, path: str, vocab_size: int) -> None:
    """Refuses a vocabulary that lacks ids of the tokenizer; a larger one, padded, is fine. Raises ``ConfigError``."""
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} must be at least {tokenizer.vocab_size} for the ids of data.tokenizer="
            f"{printable(path)}; nearest valid value: {tokenizer.vocab_size}"
        )


class ByteTokenizer:
    """Takes bytes as ids, 0 to 255."""

    vocab_size = BYTE_IDS
    eos_ids: tuple[int, ...] = ()
    unknown: int | None = None
    content = digest = BYTES

    def __init__(self, policy: Policy = Policy()) -> None:
        if policy != Policy():
            raise ConfigError(
                f"data.bos={str(policy.bos).lower()} data.eos={str(policy.eos).lower()} "
                f"data.special_tokens={policy.special_tokens}: bytes have no special tokens; name a tokenizer by "
                "data.tokenizer, or leave them out"
            )
        self.policy = policy

    def encode_documents(self, texts: Sequence[str | bytes], origin: Origin = str) -> list[Ids]:
        """Returns the bytes of each document."""
        raw = (text.encode() if isinstance(text, str) else text for text in texts)
        return [np.frombuffer(one, dtype=np.uint8).astype(np.uint32) for one in raw]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text that bytes are; ids above them, which only a padded vocabulary has, become U+FFFD."""
        parts = (bytes([one]) if one < BYTE_IDS else b"\xff" for one in ids)
        return b"".join(parts).decode("utf-8", "replace")

    def facts(self) -> dict[str, Any]:
        """Returns its name."""
        return {"digest": BYTES, "vocab_size": BYTE_IDS}


class FileTokenizer:
    """Encodes as a ``tokenizer.json`` says."""

    def __init__(self, definition: Definition, policy: Policy) -> None:
        self.definition = definition
        self.policy = policy
        self.content = definition.digest
        self._library = _built(definition)
        vocabulary = self._vocabulary()
        self.vocab_size = 1 + max(vocabulary.values())
        model = definition.parts["model"]
        unigram = model.get("type") == "Unigram"
        self.unknown = model.get("unk_id") if unigram else vocabulary.get(model.get("unk_token") or "")
        self._bos = self._mark("bos") if policy.bos else None
        self._eos = self._mark("eos") if policy.eos else None
        self._library.encode_special_tokens = policy.special_tokens == "text"
        self._special = np.zeros(self.vocab_size, dtype=bool)
        self._special[[one for one in definition.specials if one != self.unknown]] = policy.special_tokens == "text"
        self._alphabet = alphabet_of(definition, vocabulary)

    @property
    def _where(self) -> str:
        return printable(self.definition.file)

    def _vocabulary(self) -> dict[str, int]:
        """Returns ids by token. Raises ``DataError`` where they are not the ones that the file states."""
        found: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        if not found or len(set(found.values())) != len(found) or max(found.values()) >= _MOST_IDS:
            raise DataError(
                f"{self._where}: each of its tokens must have an id of its own below {_MOST_IDS}; copy the file again"
            )
        for one in self.definition.parts["added_tokens"]:
            if found.get(one["content"]) != one["id"]:
                raise DataError(
                    f"{self._where}: added_tokens says that {one['content']!a} has id {one['id']}, the vocabulary "
                    f"makes it {found.get(one['content'])}; copy the file again"
                )
        return found

    @property
    def digest(self) -> str:
        """Names content and policy, such as ``5f2c…+eos=2``."""
        marks = [("bos", self._bos), ("eos", self._eos)]
        words = [f"+{name}={token}" for name, token in marks if token is not None]
        return self.content + "".join(words) + ("+special_ids" if self.policy.special_tokens == "ids" else "")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens at which generation stops: those of the generation configuration, and the tokenizer's EOS."""
        named = self.definition.names("eos_token")
        own = None if named is None else self._library.token_to_id(named)
        return tuple(dict.fromkeys([*([] if own is None else [own]), *self.definition.generation_ends()]))

    def encode_documents(self, texts: Sequence[str | bytes], origin: Origin = str) -> list[Ids]:
        """Returns the ids of each document, with BOS and EOS as the policy says; an empty document has none."""
        strings = [_string(text, number, origin) for number, text in enumerate(texts)]
        if self._alphabet is not None:
            for number, text in enumerate(strings):
                self._refuse_lost(text, number, origin)
        long = {number: ids for number, text in enumerate(strings) if (ids := self._long(text)) is not None}
        short = ["" if number in long else text for number, text in enumerate(strings)]
        found = []
        for number, encoding in enumerate(self._encodings(short, origin)):
            ids = long[number] if number in long else np.array(encoding.ids, dtype=np.uint32)
            self._refuse_special(ids, number, origin)
            around = [np.array([mark], dtype=np.uint32) if mark is not None else ids[:0] for mark in self._marks]
            found.append(np.concatenate([around[0], ids, around[1]]) if len(ids) else ids)
        return found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of ids; those of a padded vocabulary, which name nothing, give none."""
        text: str = self._library.decode([int(one) for one in ids], skip_special_tokens=skip_special_tokens)
        return text

    def facts(self) -> dict[str, Any]:
        """Returns what determines the ids, and what about it a user may not expect."""
        return {
            "path": str(self.definition.file),
            "digest": self.digest,
            "content": self.content,
            "vocab_size": self.vocab_size,
            **asdict(self.policy),
            "noted": self.notes(),
        }

    def notes(self) -> list[str]:
        """Lists what a user may not expect, a sentence each."""
        notes = [f"{part} stored in the file is switched off" for part in self.definition.turned_off]
        kinds = list(kinds_in(self.definition.parts.get("normalizer")))
        if kinds:
            notes.append(f"the normalizer ({', '.join(dict.fromkeys(kinds))}) may change text before it is tokenized")
        if not self._keeps(_PROBE):
            notes.append("a probe text did not come back from its ids as it was: text is changed on the way")
        for role, wanted in (("bos", self.policy.bos), ("eos", self.policy.eos)):
            if self.definition.adds(f"{role}_token") and not wanted:
                notes.append(
                    f"tokenizer_config.json adds {role.upper()} to each text, and data.{role}=false leaves it out"
                )
        return notes

    def _long(self, text: str) -> Ids | None:
        """Returns the ids of a text that is too long to be encoded at once, where they can be had in pieces."""
        if len(text) < 2 * PIECE or self.definition.parts["model"].get("type", "BPE") != "BPE":
            return None
        return encode_long(self._library, text)

    def _encodings(self, strings: list[str], origin: Origin) -> list[Any]:
        try:
            found: list[Any] = self._library.encode_batch_fast(strings, add_special_tokens=False)
            return found
        except BaseException as error:
            if len(strings) == 1:
                raise _typed(error, f"{origin(0)}: {self._where} cannot encode it") from error
        # One of them is to blame, and alone it is named.
        return [self._encodings([text], partial(_always, origin(at)))[0] for at, text in enumerate(strings)]

    @property
    def _marks(self) -> tuple[int | None, int | None]:
        return self._bos, self._eos

    def _keeps(self, text: str) -> bool:
        """Tells whether a text comes back from its ids as it was."""
        try:
            return self.decode(self.encode_documents([text])[0].tolist()).strip() == text
        except DataError:
            return False

    def _mark(self, role: str) -> int:
        named = self.definition.names(f"{role}_token")
        token = None if named is None else self._library.token_to_id(named)
        if token is None:
            said = "no file beside it names one" if named is None else f"the vocabulary has no {named!a}"
            raise ConfigError(
                f"data.{role}=true: {self._where} has no {role.upper()} token ({said}); write "
                f'{{"{role}_token": "..."}} into a tokenizer_config.json beside it, or set data.{role}=false'
            )
        return int(token)

    def _refuse_special(self, ids: Ids, number: int, origin: Origin) -> None:
        found = self._special[ids]
        if found.any():
            place = int(np.argmax(found))
            token = int(ids[place])
            raise DataError(
                f"{origin(number)}, token {place}: plain text becomes the special token "
                f"{self.definition.specials[token]!a} (id {token}), since the vocabulary holds it as an ordinary piece "
                "too; take it out of the text, or set data.special_tokens=ids, which reads all special tokens as such"
            )

    def _refuse_lost(self, text: str, number: int, origin: Origin) -> None:
        """Refuses characters that the model would leave out, since it has no token for the unknown."""
        normalizer = self._library.normalizer
        seen = text if normalizer is None else normalizer.normalize_str(text)
        lost = self._alphabet.missing(seen) if self._alphabet is not None else None
        if lost:
            raise DataError(
                f"{origin(number)}: {self._where} has no token for {lost}, none for unknown text, and would leave it "
                "out in silence; train the tokenizer with a whole alphabet, or take the text out"
            )


def _always(name: str, number: int) -> str:
    return name


def _string(text: str | bytes, number: int, origin: Origin) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin(number)}: bad UTF-8 at byte {error.start}: {text[error.start :][:4]!r}; a tokenizer takes text: "
            "save it as UTF-8, or leave data.tokenizer out, for bytes"
        ) from None


def _built(definition: Definition) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise NotAvailableError(
            f"data.tokenizer={printable(definition.file)} needs the package tokenizers ({error}); install "
            "longctx[hf], or leave it out for bytes"
        ) from error
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition.parts))
    except BaseException as error:
        raise _typed(error, f"{printable(definition.file)}: is no tokenizer that `tokenizers` reads") from error


def _typed(error: BaseException, what: str) -> BaseException:
    """Returns an error of ours for one of the library's, whose panics are no ``Exception``; others as they are."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return DataError(f"{what}: {printable(str(error))[:300]}")
    return error
