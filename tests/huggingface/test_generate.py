"""``longctx generate`` goes on as ``transformers.generate`` does, greedily, token for token, on any mesh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.data.tokenizer import ByteTokenizer
from longctx.launcher.cli import main
from longctx.launcher.decoding.text import TextStream
from tests.huggingface.small_models import CASES, SIZES, published, saved

import torch  # isort: skip

NEW = 16
# Prompts shorter and longer than the windows, of one token, of lengths that nothing divides.
RUNS = {
    "llama": (7, ["comm=sim", "parallel.tp=2"]),
    "llama tied": (1, ["comm=sim", "parallel.sp=2", "attention=gather"]),
    "mistral": (29, ["comm=sim", "parallel.sp=2", "parallel.tp=2"]),
    "qwen2": (23, ["comm=sim", "parallel.pp=2", "parallel.sp=2"]),
    "qwen3": (5, ["comm=sim", "parallel.dp_shard=2"]),
    "olmo2": (13, ["comm=sim", "parallel.sp=3"]),
    "olmo3": (31, ["comm=sim", "parallel.pp=2"]),
    "qwen3.5": (11, ["comm=sim", "parallel.sp=2", "parallel.tp=2", "attention.linear=lasp2"]),
    "olmo hybrid": (17, ["comm=sim", "parallel.pp=2", "attention.linear=lasp2"]),
    "gemma3": (19, ["comm=sim", "parallel.tp=2"]),
}


def ids_of(length: int) -> list[int]:
    return torch.randint(SIZES["vocab_size"], (length,), generator=torch.Generator().manual_seed(length)).tolist()


def theirs(name: str, prompt: list[int], **options: Any) -> list[int]:
    with torch.no_grad():
        given = torch.tensor([prompt])
        out = (
            published(name)
            .float()
            .generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        )
    return out[0, len(prompt) :].tolist()


def ours(capsys: pytest.CaptureFixture[str], directory: Path, prompt: list[int], *words: str) -> dict[str, Any]:
    ids = ",".join(map(str, prompt))
    assert (
        main(["generate", "--hf", str(directory), "--prompt-ids", ids, "--max-tokens", str(NEW), "--json", *words]) == 0
    )
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


SAMPLED = ("mistral", "qwen3.5", "olmo3")  # of make test: windows, states, stages


@pytest.mark.parametrize(
    "name", [name if name in SAMPLED else pytest.param(name, marks=pytest.mark.matrix) for name in CASES]
)
def test_greedy_is_that_of_transformers(name, tmp_path, capsys):
    directory = saved(name, tmp_path)
    length, mesh = RUNS[name]
    for prompt, words in ((ids_of(length), mesh), (ids_of(3), [])):
        found = ours(capsys, directory, prompt, *words)
        assert found == {"prompt_ids": prompt, "ids": theirs(name, prompt), "text": None}


@pytest.mark.gloo
def test_two_processes_and_stop_ids(tmp_path, capsys):
    directory, prompt = saved("mistral", tmp_path), ids_of(17)
    free = theirs("mistral", prompt)
    stop = free[5]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 95]}))
    mesh = ["comm=gloo", "parallel.sp=2"]
    expected = theirs("mistral", prompt, eos_token_id=[stop, 95])
    assert ours(capsys, directory, prompt, *mesh)["ids"] == expected == free[: free.index(stop) + 1]
    assert ours(capsys, directory, prompt, "--stop-ids", "none")["ids"] == free
    drawn = [
        ours(
            capsys, directory, prompt, "--temperature", "0.9", "--top-p", "0.8", "--seed", "4", "--stop-ids", "none", *m
        )
        for m in ([], ["comm=sim", "parallel.sp=2"], ["comm=sim", "parallel.pp=2"])
    ]
    assert drawn[0] == drawn[1] == drawn[2] and drawn[0]["ids"] != free


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--prompt", "text"], 2, "--prompt-ids"),
        (["--prompt-ids", "1,x"], 2, "comma-separated"),
        (["--prompt-ids", "96"], 78, "0 to 95"),
        (["--prompt-ids", "1", "--step", "3"], 2, "of a run"),
        (["--prompt-ids", "1", "--top-p", "0"], 78, "top_p 0.0 must be above 0"),
        (["--prompt-ids", "1", "--stop-ids", "-3"], 78, "--stop-ids has id -3"),
        (["--prompt-ids", "1", "optim.lr=1"], 2, "does not read optim.lr"),
        (["--prompt-ids", "1", "attention.server_pool=pipeline"], 78, "server_pool=sequence"),
    ],
)
def test_what_cannot_be_served_is_refused_before_work(words, code, told, tmp_path, capsys):
    directory = saved("llama", tmp_path)
    assert main(["generate", "--hf", str(directory), "--max-tokens", "2", *words]) == code
    assert told in capsys.readouterr().err


def test_text_comes_in_pieces_and_never_half_a_character():
    text, pieces = "Zwölf 尺八 🎋 ok", []
    stream = TextStream(ByteTokenizer(), pieces.append)
    for byte in text.encode():
        stream.add(byte)
    stream.add(0xC3)
    stream.end()
    assert "".join(pieces) == text + "\ufffd\n"
    assert len(pieces) == len(text) + 2
