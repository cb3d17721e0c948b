"""Lists Hydra's groups and their options: files of ``conf/``, names of the catalog, files in folders of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import longctx
from longctx.catalog import ENGINES, LINEAR_STRATEGIES, OPTIMIZERS, SOURCES, STRATEGIES, Registry
from longctx.errors import ConfigError
from longctx.rules import suggestion

CONF = Path(longctx.__file__).parent / "conf"

# Groups whose options are names of the catalog -> the field that holds the name.
NAMED: dict[str, tuple[str, tuple[Registry, ...]]] = {
    "attention": ("strategy", (STRATEGIES, LINEAR_STRATEGIES)),
    "data": ("source", (SOURCES,)),
    "engine": ("name", (ENGINES,)),
    "optim": ("name", (OPTIMIZERS,)),
}


def groups(folders: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Lists every configuration group with its options; ``folders`` are those of ``--config-dir``."""
    found = {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in CONF.iterdir() if folder.is_dir()}
    for group, (_, registries) in NAMED.items():
        found.setdefault(group, set()).update(*registries)
    for folder in folders:
        for file in files_of(folder):
            found[file.parent.name].add(file.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}


def files_of(folder: Path) -> Iterator[Path]:
    """Lists the options of a folder of one's own: ``folder/GROUP/OPTION.yaml``."""
    return (file for group in sorted(folder.iterdir()) if group.is_dir() for file in sorted(group.glob("*.yaml")))


def own_folder(name: str) -> Path:
    """Returns a folder of options after a look into it. Raises ``ConfigError`` where something would go unread."""
    folder, known = Path(name), groups()
    if name.startswith("pkg:") or not folder.is_dir():
        raise ConfigError(
            f"--config-dir {name} is not a folder; it holds GROUP/OPTION.yaml, for example model/mine.yaml"
        )
    for file in sorted(folder.glob("*.y*ml")):
        raise ConfigError(f"{file} is in no group; choose it by recipe={file}, or move it to {folder}/recipe/")
    options = list(files_of(folder))
    if not options:
        raise ConfigError(f"--config-dir {name} holds no option; one lies in GROUP/OPTION.yaml, as model/mine.yaml")
    for file in options:
        group, option = file.parent.name, file.stem
        if group not in known:
            raise ConfigError(f"{file}: {group} is not a group; {suggestion(group, list(known))}")
        if option in known[group]:
            raise ConfigError(f"{file}: {group}={option} is longctx's own, which comes first; give yours another name")
    return folder.absolute()
