"""``longctx verify --hf``: a directory's model on a mesh is that of ``transformers``, and what differs is seen."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longctx.huggingface.reference.sample import draw_tokens
from longctx.huggingface.reference.step import ReferenceStep
from longctx.launcher import cli
from longctx.launcher.verify.directory import relative_errors
from tests.huggingface.small_models import published
from tests.huggingface.verifying import directory_of, verify

DOCUMENTS = (37, 1, 26, 19)


def test_a_dump_holds_the_step_that_anyone_can_take(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is over all labels of all rows, and rows that fill up a mesh leave no trace."""
    file = tmp_path / "step.safetensors"
    words = ["--documents", "37,1,26,19", "--batch", "3", "--dtype", "float32", "--dump", str(file)]
    mesh = ["parallel.pp=2", "parallel.dp_shard=2", "parallel.sp=2", "attention=striped"]
    status, verdict = verify(capsys, directory_of("qwen3", folder), *words, *mesh)
    assert status == 0 and verdict["passed"] and max(verdict["errors"].values()) < 1e-5
    dumped, model = load_file(file), published("qwen3")
    model.zero_grad()
    rows = [torch.cat([model(one[None]).logits[0] for one in row.split(DOCUMENTS)]) for row in dumped["tokens"]]
    torch.testing.assert_close(dumped["logits"], torch.stack(rows), rtol=1e-4, atol=1e-4)
    labelled = [n for n in range(sum(DOCUMENTS) - 1) if n + 1 not in (37, 38, 64)]
    losses = [
        torch.nn.functional.cross_entropy(logits[n], row[n + 1])
        for logits, row in zip(rows, dumped["tokens"], strict=True)
        for n in labelled
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert float(dumped["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    gradients = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    assert set(dumped) == {"tokens", "logits", "loss", *gradients}
    for name, gradient in gradients.items():
        assert torch.linalg.vector_norm(dumped[name] - gradient) < 1e-5 * torch.linalg.vector_norm(gradient) + 1e-7


def test_another_weight_on_one_side_fails_with_70(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longctx.huggingface.reference import step

    read = step._read

    def otherwise(*arguments: Any) -> Any:
        model = read(*arguments)
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight[0, 0] += 1e-6
        return model

    monkeypatch.setattr(step, "_read", otherwise)
    status, verdict = verify(capsys, directory_of("llama tied", folder), "--seq", "20")
    assert status == 70 and not verdict["passed"] and verdict["errors"]["logits"] > 1e-9


def test_a_weight_that_one_side_alone_has_is_off_by_everything() -> None:
    one = torch.ones(2)
    found, expected = (ReferenceStep(one, one[0], {name: one, "both": one}) for name in ("ours", "theirs"))
    errors = relative_errors(found, expected)
    assert errors["grad.ours"] == errors["grad.theirs"] == math.inf and errors["grad.both"] == 0.0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def without_a_weight(path: Path) -> None:
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "damage", "status", "told"),
    [
        ("model-00001-of-*", cut, 65, "its tensors end at byte"),
        ("model-00002-of-*", Path.unlink, 65, "cannot be read"),
        ("*.index.json", cut, 65, "cannot be read as an index"),
        ("*.index.json", without_a_weight, 78, "missing model.norm.weight"),
        ("generation_config.json", cut, 65, "generation_config.json cannot be read"),
        ("tokenizer.json", lambda path: path.write_text('{"added_tokens": [5]}'), 65, "tokenizer.json is damaged"),
    ],
)
def test_what_is_damaged_is_told_before_any_rank_starts(
    file: str,
    damage: Callable[[Path], Any],
    status: int,
    told: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(directory_of("mistral", folder), directory)
    damage(next(iter([*directory.glob(file), directory / file])))
    monkeypatch.setattr("longctx.launcher.verify.directory.Reference", None)
    capsys.readouterr()  # what transformers says when it saves
    assert cli.main(["verify", "--hf", str(directory), "comm=gloo", "parallel.sp=2"]) == status
    words = capsys.readouterr()
    assert not words.out and words.err.startswith("longctx: ") and told in words.err
    assert len(words.err.splitlines()) == 1


def test_a_model_that_transformers_refuses_is_told_with_78(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "refused"
    shutil.copytree(directory_of("mistral", folder), directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**config, "use_cache": "x"}), encoding="utf-8")
    status, verdict = verify(capsys, directory, "--seq", "8")
    assert status == 78 and "transformers cannot make" in verdict["refused"] and "use_cache" in verdict["refused"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallel.sp=3", "attention=ulysses"], "ulysses"),
        (["parallel.tp=3"], "parallel.tp=3"),
        (["--documents", "1,1"], "no successor"),
        (["--documents", "3,4", "--seq", "8"], "add up to 7"),
        (["--dtype", "bfloat16"], "float32"),
        (["model.rope.rope_type=yarn", "model.rope.factor=4"], "original_max_position_embeddings"),
    ],
)
def test_a_refusal_is_told_with_78(
    words: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, verdict = verify(capsys, directory_of("mistral", folder), *words)
    assert status == 78 and told in verdict["refused"] and not verdict["passed"] and verdict["errors"] == {}


@pytest.mark.parametrize("word", ["data.seq_len=5", "model.window=3", "train.dtype=float32", "model=tiny"])
def test_what_the_command_sets_itself_is_a_usage_error(word: str, folder: Path) -> None:
    assert cli.main(["verify", "--hf", str(directory_of("mistral", folder)), "comm=sim", word]) == 2


def test_tokens_are_real_and_never_special(tmp_path: Path) -> None:
    tokenizer = {
        "model": {"vocab": {str(number): number for number in range(40)}},
        "added_tokens": [{"id": 40, "special": True}, {"id": 41, "special": False}, {"id": 0, "special": True}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [3, 4], "vision": {"image_token_id": 5}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"pad_token_id": 6}))
    drawn = draw_tokens(tmp_path, 64, 2, 4000, seed=1)
    assert set(drawn.flatten().tolist()) == set(range(42)) - {0, 3, 4, 5, 6, 40}
    assert torch.equal(drawn, draw_tokens(tmp_path, 64, 2, 4000, seed=1))
    (tmp_path / "tokenizer.json").unlink()
    assert int(draw_tokens(tmp_path, 64, 2, 4000, seed=1).max()) == 63
