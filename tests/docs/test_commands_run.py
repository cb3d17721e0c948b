"""Commands of README, the site and the help run: as they stand where that is quick, or small in ``sim``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from longctx.config import Config, simulated_world_size
from longctx.data import write_tokens
from longctx.launcher.cli import main
from longctx.launcher.compose import compose
from tests.docs.test_commands_in_pages import commands, parsed, readers_folder

__all__ = ["readers_folder"]

# What a command needs that no fixture here has, as tokenizers of the reader's own; tests of their own run these.
ELSEWHERE = (
    "--resume",
    "--auto-resume",
    "--cfg",
    "init.from",
    "model=hf",
    "--hf",
    "--all",
    "--mesh",
    "data.tokenizer",
    "/data/",
)
OWN_DATA = re.compile(r"\+{0,2}data(=|\.(path|token_dtype|files|text_key|validation\.path)=)")


def runs_here(parameter: pytest.param) -> bool:
    [words] = parameter.values
    return not any(word.startswith(ELSEWHERE) or "/data/" in word for word in words)


def of(*names: str) -> list[pytest.param]:
    return [parameter for name in names for parameter in commands(f"longctx {name}") if runs_here(parameter)]


@pytest.fixture
def own_folder(readers_folder, monkeypatch, tmp_path) -> Path:
    """A folder with the reader's files and corpora."""
    monkeypatch.chdir(readers_folder)
    corpus = readers_folder / "corpus"
    for folder in (corpus, readers_folder / "docs"):
        folder.mkdir(exist_ok=True)
        (folder / "a.md").write_text("Four score and seven years ago. " * 200, encoding="utf-8")
        (folder / "b.txt").write_text("Call me Ishmael. " * 300, encoding="utf-8")
    (readers_folder / "held-out.jsonl").write_text('{"text": "It was the best of times."}\n' * 50, encoding="utf-8")
    return tmp_path


def small(config: Config, processes: int, words: list[str]) -> list[str]:
    """What makes a run small: two steps of a small model on short sequences, all ranks in this process."""
    degrees = config.parallel
    others = simulated_world_size(config) // max(degrees.dp_shard, 1)
    model, typed = config.model, " ".join(words)
    fields = {
        "train.dtype": "float32",
        "train.steps": 2,
        "train.global_batch": 4 * max(1, degrees.dp_replicate) * max(1, processes // others),
        "parallel.dp_shard": max(1, processes // others),
        "data.seq_len": min(config.data.seq_len, 256),
        "data.max_documents": 40,
        "model.dim": 64,
        "model.layers": max(8 if degrees.pp > 1 else 4, len(model.pattern)),
        "model.heads": 8,
        "model.hidden_dim": 128,
        "logger.wandb": "disabled",
    }
    if model.kv_heads is not None and "model.linear" not in typed:
        fields["model.kv_heads"] = 8 if model.kv_heads == model.heads else 4
    return ["comm=sim", *(f"{key}={value}" for key, value in fields.items())]


def replaced(words: list[str], folder: Path) -> list[str]:
    """The overrides of a command without its ``comm``, and without data that the folder lacks."""
    path = next((word.partition("=")[2] for word in words if word.startswith("data.path=")), None)
    if path is not None and path.endswith(".bin"):
        dtype = "uint32" if "data.token_dtype=uint32" in words else "uint16"
        write_tokens(folder / path, [np.arange(3000) % 256], dtype)
    lacking = path is not None and not (folder / path).exists()
    kept = [word for word in words if not word.startswith(("comm=", "run.dir="))]
    return [word for word in kept if not (lacking and OWN_DATA.match(word))]


@pytest.mark.matrix
@pytest.mark.parametrize("words", of("train", "launch", "bench step"))
def test_a_run_of_a_page_runs_small(words, own_folder, readers_folder):
    arguments = parsed(words)
    overrides = replaced(list(arguments.overrides), readers_folder)
    config = compose(overrides)
    extra = small(config, getattr(arguments, "nproc", 1), overrides)
    options = [word for word in words if word.startswith("--config-dir") or word == "own"]
    typed = [*options, *overrides, *extra, f"run.dir={own_folder / 'run'}"]
    assert main(["train", *typed]) == 0, shlex.join(typed)


@pytest.mark.matrix
@pytest.mark.parametrize("words", of("verify"))
def test_a_verification_of_a_page_runs(words, own_folder, monkeypatch):
    monkeypatch.chdir(own_folder)
    assert main(words[1:]) == 0


@pytest.mark.matrix
@pytest.mark.parametrize("words", of("submit"))
def test_a_submission_of_a_page_is_rendered(words, own_folder, capsys):
    assert main(["submit", "--dry-run", *[word for word in words[2:] if word != "--dry-run"]]) == 0
    assert "#SBATCH" in capsys.readouterr().out


@pytest.mark.matrix
@pytest.mark.parametrize("words", of("data"))
def test_an_audit_of_a_page_is_made(words, own_folder):
    assert main(words[1:]) == 0


@pytest.mark.matrix
@pytest.mark.parametrize("words", [one for one in of("tokenize") if "bytes" in one.values[0]])
def test_texts_of_a_page_are_tokenized(words, own_folder):
    for made in Path().glob("corpus.*"):  # by another page's command
        made.unlink()
    assert main([*words[1:]]) == 0
