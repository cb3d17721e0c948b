"""Finds what a tokenizer would leave out of a text in silence: a model without a token for the unknown."""

from __future__ import annotations

from dataclasses import dataclass

from longctx.data.tokenizing.definition import Definition, kinds_in

_BYTES = range(256)
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 does not use


@dataclass(frozen=True)
class Alphabet:
    """Holds what a model without a token for the unknown has tokens for: bytes, or characters."""

    known: frozenset[str]
    in_bytes: bool

    def missing(self, text: str) -> str | None:
        """Names what a text has beyond it."""
        if self.in_bytes:
            lost = sorted(byte for byte in set(text.encode("utf-8")) if _NAMES[byte] not in self.known)
            return f"the byte {lost[0]:#04x}" if lost else None
        found = sorted(one for one in set(text) - self.known if not one.isspace())
        return repr(found[0]) if found else None


def alphabet_of(definition: Definition, vocabulary: dict[str, int]) -> Alphabet | None:
    """Returns what a BPE model has tokens for where it would leave the rest out, else None: nothing is lost."""
    model = definition.parts["model"]
    if model.get("type", "BPE") != "BPE" or model.get("unk_token") is not None:
        return None
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in _BYTES):
        return None
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    bare = (token.removeprefix(prefix).removesuffix(suffix) for token in vocabulary)
    single = frozenset(token for token in bare if len(token) == 1)
    parts = [definition.parts.get("pre_tokenizer"), definition.parts.get("normalizer")]
    in_bytes = "ByteLevel" in list(kinds_in(parts))
    if in_bytes and single.issuperset(_NAMES[byte] for byte in _BYTES if byte not in _NEVER):
        return None
    return Alphabet(single, in_bytes)


def _byte_names() -> list[str]:
    """Returns the character by which a byte-level vocabulary writes each byte: itself if it prints, else one above."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in _BYTES if byte not in printing]
    return [chr(byte) if byte in printing else chr(len(_BYTES) + others.index(byte)) for byte in _BYTES]


_NAMES = _byte_names()
