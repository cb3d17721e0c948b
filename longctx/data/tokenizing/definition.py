"""Reads what a tokenizer's files say: what determines ids, its digest, and the tokens that begin and end a text.

Of ``tokenizer.json`` four parts determine the ids of a text: normalizer, pre-tokenizer, model and added tokens. The
others do not, once truncation and padding are off: so the digest leaves them out, and two files that two versions of a
library wrote of one tokenizer have the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.data.files import open_regular, printable, reading
from longctx.errors import ConfigError, DataError

TOKENIZER_FILE, CONFIG, SPECIALS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
GENERATION = "generation_config.json"
# What goes along with a model so that others can use it, as far as a folder has it.
CARRIED = (TOKENIZER_FILE, CONFIG, SPECIALS, "added_tokens.json", "chat_template.jinja", "chat_template.json")
DETERMINES = ("normalizer", "pre_tokenizer", "model", "added_tokens")
_LARGEST = 1 << 28
# Other files that hold a tokenizer, and what they are called.
_OTHERS = {
    "tokenizer.model": "SentencePiece",
    "spiece.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
    "tekken.json": "Tekken",
    "vocab.json": "vocabulary and merges",
    "vocab.txt": "WordPiece vocabulary",
}


@dataclass(frozen=True)
class Definition:
    """Holds what the files of a tokenizer say.

    ``parts``: of ``tokenizer.json``, ready for the library, with nothing left that shortens, pads or draws at random.
    ``turned_off``: what was taken out of them. ``digest``: SHA-256 of what determines the ids of a text.
    """

    file: Path
    parts: dict[str, Any]
    digest: str
    turned_off: tuple[str, ...]

    @property
    def specials(self) -> dict[int, str]:
        """Special tokens by id, as they are written."""
        return {one["id"]: one["content"] for one in self.parts["added_tokens"] if one["special"]}

    def names(self, role: str) -> str | None:
        """Returns the token that plays a role such as ``eos_token``, by the files beside; None where none says so."""
        for name in (CONFIG, SPECIALS):
            value = _beside(self.file, name).get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None

    def adds(self, role: str) -> bool:
        """Tells whether ``tokenizer_config.json`` says that the token of a role is added to every text."""
        return _beside(self.file, CONFIG).get(f"add_{role}") is True

    def generation_ends(self) -> list[int]:
        """Returns the ids at which the model of this folder stops, by its generation configuration."""
        value = _beside(self.file, GENERATION).get("eos_token_id")
        found = value if isinstance(value, list) else [value]
        return [one for one in found if type(one) is int and one >= 0]


def find_file(path: str | Path) -> Path:
    """Returns the ``tokenizer.json`` that a folder holds, or the file itself.

    Raises ``ConfigError`` that names what the folder holds instead, and how to convert it.
    """
    place = Path(path)
    with reading(place):
        place.stat()
        names = {entry.name for entry in place.iterdir()} if place.is_dir() else None
    if names is None:
        _refuse_other(place)
        return place
    if TOKENIZER_FILE in names:
        return place / TOKENIZER_FILE
    other = next((name for name in _OTHERS if name in names), None)
    if other is not None:
        _refuse_other(place / other)
    raise ConfigError(
        f"data.tokenizer={printable(path)}: the folder holds no {TOKENIZER_FILE}; name one that does, as those of "
        "Hugging Face models, or leave it out for bytes"
    )


def _refuse_other(file: Path) -> None:
    kind = _OTHERS.get(file.name)
    if kind is not None:
        folder = printable(file.parent)
        raise ConfigError(
            f"data.tokenizer={folder}: {file.name} ({kind}) is read by transformers, not here; write a "
            f'{TOKENIZER_FILE} once: python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('converted')\", and name that folder"
        )


def read_definition(file: Path) -> Definition:
    """Reads a ``tokenizer.json``. Raises ``DataError`` naming the file for what is no tokenizer."""
    parts = _parsed(file)
    where = printable(file)
    if not isinstance(parts.get("model"), dict) or not isinstance(parts.get("added_tokens", []), list):
        raise DataError(f"{where}: has no model, or its added_tokens are no list; it is no tokenizer of `tokenizers`")
    added = parts["added_tokens"] = parts.get("added_tokens", [])
    for one in added:
        if not isinstance(one, dict) or type(one.get("id")) is not int or not isinstance(one.get("content"), str):
            raise DataError(f"{where}: added_tokens holds {one!r:.100}; each has an id and a content")
        one.setdefault("special", False)
    model, turned_off = parts["model"], []
    for part in ("truncation", "padding"):
        if parts.get(part) is not None:
            turned_off.append(part)
            parts[part] = None
    if model.get("dropout"):
        turned_off.append("dropout")
        model["dropout"] = None
    parts["post_processor"] = None  # what it puts around a text is the policy's to say
    return Definition(file, parts, _digest(parts), tuple(turned_off))


def _parsed(file: Path) -> dict[str, Any]:
    where = printable(file)
    with open_regular(file) as opened:
        content = opened.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise DataError(f"{where}: more than {_LARGEST} bytes; a tokenizer has a few MB")
    try:
        parts = json.loads(content.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON: {printable(str(error))}; copy the file again") from None
    if not isinstance(parts, dict):
        raise DataError(f"{where}: holds {type(parts).__name__}; a tokenizer is an object")
    return parts


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!a} appears twice")
    return found


def _digest(parts: dict[str, Any]) -> str:
    """Hashes what determines ids, written one way: merges as pairs, what is off left out, keys in order."""
    model = {key: value for key, value in parts["model"].items() if value is not None and value is not False}
    if isinstance(model.get("merges"), list):
        model["merges"] = [one.split(" ") if isinstance(one, str) else one for one in model["merges"]]
    added = sorted(parts["added_tokens"], key=lambda one: one["id"])
    chosen = {**{name: parts.get(name) for name in DETERMINES}, "model": model, "added_tokens": added}
    text = json.dumps(chosen, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"longctx tokenizer 1 " + text.encode()).hexdigest()


def _beside(file: Path, name: str) -> dict[str, Any]:
    """Returns what a file beside ``tokenizer.json`` says; nothing where there is none."""
    place = file.with_name(name)
    return _parsed(place) if place.exists() else {}


def kinds_in(part: Any) -> Iterator[str]:
    """Yields the types that a part of a tokenizer is made of, such as those in a sequence of normalizers."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str) and part["type"] != "Sequence":
            yield part["type"]
        for value in part.values():
            yield from kinds_in(value)
    elif isinstance(part, list):
        for value in part:
            yield from kinds_in(value)
