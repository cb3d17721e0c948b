"""Finds the weights of a model directory without reading them: which file holds which bytes of which tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longctx.checkpoint.files import opened, read_range
from longctx.checkpoint.manifest import DTYPES, Chunk
from longctx.checkpoint.shards import Located
from longctx.checkpoint.state import COPY
from longctx.errors import ConfigError, DataError
from longctx.huggingface.config_in import CONFIG
from longctx.huggingface.names import Place, joined_shape
from longctx.huggingface.pieces import cut_out, rows_shape

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD = "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"  # old directories store what follows from the configuration
_LARGEST_HEADER = 1 << 27
_PART = 16 << 20


def locate_weights(directory: Path) -> dict[str, Located]:
    """Returns where each tensor of a directory lies, by its published name.

    Raises ``DataError`` naming the file where index, headers and sizes do not agree.
    """
    index, single = directory / INDEX, directory / SINGLE
    if single.exists():  # before an index, as transformers reads: one that was sharded before is left behind
        return {name: (single.resolve(), chunk) for name, chunk in read_header(single).items()}
    if not index.exists():
        held = sorted(path.name for path in directory.glob("*.bin"))
        pickles = f"; {held[0]} is a pickle, which is not read: save the model as safetensors" if held else ""
        raise DataError(f"{directory} holds neither {SINGLE} nor {INDEX}{pickles}")
    weight_map = _weight_map(index)
    headers = {file: read_header(directory / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise DataError(f"{index} says that {file} holds {name!r:.120}, which it does not")
    # Caches of downloads hold links to files that lie elsewhere.
    return {name: ((directory / file).resolve(), headers[file][name]) for name, file in weight_map.items()}


def read_header(path: Path) -> dict[str, Chunk]:
    """Returns the tensors of a safetensors file; every offset is checked against the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_LARGEST_HEADER, size - 8):
                raise DataError(f"{path}: its header claims {length} bytes, and the file has {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its header is no JSON: {error}") from None
    if type(header) is not dict:
        raise DataError(f"{path}: its header is no mapping")
    start = 8 + length
    chunks = {name: _chunk(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for chunk in sorted(chunks.values(), key=lambda one: one.start):
        if chunk.start != start + end:
            raise DataError(
                f"{path}: {chunk.name!r:.120} starts at byte {chunk.start}, the one before ends at {start + end}"
            )
        end += chunk.bytes
    if start + end != size:
        raise DataError(f"{path}: its tensors end at byte {start + end}, and the file has {size}")
    return chunks


def _chunk(path: Path, name: str, entry: Any, start: int) -> Chunk:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = dtype in DTYPES and all(type(n) is int and n >= 0 for n in (*shape, first, last))
        expected = math.prod(shape) * DTYPES[dtype].itemsize if sound else -1
    except (KeyError, TypeError, ValueError):
        sound, expected = False, -1
    if not sound or last - first != expected:
        raise DataError(f"{path}: {name!r:.120} is described by {entry!r:.200}, which does not add up")
    return Chunk(name, dtype, shape, (0,) * len(shape), shape, start + first, expected)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        sound = all(type(name) is str and type(file) is str for name, file in weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{index} cannot be read as an index of weights: {error}") from None
    if not sound:
        raise DataError(f"{index}: weight_map names a file for each tensor")
    for file in weight_map.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise DataError(f"{index}: {file!r:.120} is no safetensors file of this directory")
    return dict(weight_map)


def match_names(
    pieces: Mapping[str, Sequence[Located]],
    wanted: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    where: Path,
    whole: set[str],
) -> dict[str, list[Located]]:
    """Returns where each of this rank's parameters lies, by our names.

    ``pieces``: the tensors of a directory that make each of ``transformers``. ``wanted``: the place of a parameter;
    ``shapes``: of all parts of these. ``whole``: published names of the whole model. A tied model's directory may hold
    the head as well. Raises ``ConfigError`` for tensors that are missing, unknown or of another shape.
    """
    missing = sorted(whole - set(pieces))
    extra = sorted(name for name in set(pieces) - whole - {HEAD} if not name.endswith(_COMPUTED))
    if missing or extra:
        raise ConfigError(
            f"{where} holds another model than its {CONFIG}: missing {_some(missing)}, unknown {_some(extra)}"
        )
    for place in dict.fromkeys(wanted.values()):
        made = pieces[place.name]
        if not DTYPES[made[0][1].dtype].is_floating_point:
            raise ConfigError(f"{where}: {place.name} is {made[0][1].dtype}, and weights are real numbers")
        found, expected = rows_shape(made), joined_shape([shapes[part] for part in place.parts])
        if found != expected:
            held = " and ".join(f"{list(chunk.shape)} {chunk.dtype}" for _, chunk in made)
            raise ConfigError(f"{where}: {place.name} is {held}, {CONFIG} makes it {list(expected)}")
    return {name: _parts(pieces[place.name], name, place, shapes) for name, place in wanted.items()}


def _parts(made: Sequence[Located], name: str, place: Place, shapes: Mapping[str, tuple[int, ...]]) -> list[Located]:
    """Returns where the parameter ``name`` lies in what the pieces of its place make."""
    if len(place.parts) == len(made) == 1:
        return list(made)
    own = name.removesuffix(COPY)
    before = sum(math.prod(shapes[part]) for part in place.parts[: place.parts.index(own)])
    return cut_out(made, own, shapes[own], before)


def require_one_head(pieces: Mapping[str, Sequence[Located]], prefix: str, where: Path) -> None:
    """Refuses a tied model whose directory also holds a head that is another one. Reads both in parts."""
    tied = [pieces[name][0] for name in (HEAD, f"{prefix}embed_tokens.weight") if name in pieces]
    if len(tied) < 2:
        return
    head, embedding = (chunk for _, chunk in tied)
    with opened(tied[0][0]) as first, opened(tied[1][0]) as second:
        same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and all(
            read_range(first, head.start + start, size, tied[0][0])
            == read_range(second, embedding.start + start, size, tied[1][0])
            for start in range(0, head.bytes, _PART)
            for size in [min(_PART, head.bytes - start)]
        )
    if not same:
        raise ConfigError(
            f"{where} says tie_word_embeddings=true and holds a {HEAD} that is not the embedding; one of them is "
            "wrong: remove the tensor, or say false"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "nothing"
