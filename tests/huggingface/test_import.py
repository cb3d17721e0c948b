"""A directory becomes step 0 of a run, which needs the directory no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.checkpoint.bringing import Brought, share
from longctx.data import write_tokens
from longctx.errors import StorageError
from longctx.huggingface.writing.source import read_source
from longctx.launcher.cli import main
from tests.huggingface.small_models import CASES, SIZES, published, saved
from tests.huggingface.test_export import logits, raw

BESIDE = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": "</s>", "chat_template": "{{ messages }}"}',
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "generation_config.json": b'{"eos_token_id": [2, 3]}',
    "LICENSE": b"as is",
}


def single(name: str, folder: Path) -> Path:
    """A directory with one file of weights."""
    path = folder / name.replace(" ", "-")
    published(name).save_pretrained(path)
    return path


def succeeds(*words: str) -> None:
    assert main(list(words)) == 0


def test_every_family_goes_in_and_out_byte_for_byte_without_its_directory(tmp_path: Path) -> None:
    for number, name in enumerate(CASES):
        folder = tmp_path / name.replace(" ", "-")
        directory = (saved if number % 2 else single)(name, folder)
        before = raw(directory)
        succeeds("import", "--from", str(directory), f"run.dir={folder / 'run'}", "logger.progress=false")
        shutil.rmtree(directory)
        succeeds("export", "--run", str(folder / "run"), "--to", str(folder / "out"), "--shard-size", "90kb")
        assert raw(folder / "out") == before, name


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tensors of several dtypes, a stored head though it is tied, computed tensors, and files beside.

    It lies as caches of downloads have it: links to files elsewhere.
    """
    folder = tmp_path_factory.mktemp("odd")
    plain = single("llama tied", folder)
    tensors = load_file(plain / "model.safetensors")
    tensors = {name: one if "norm" in name else one.bfloat16() for name, one in tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(10)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    for name, data in BESIDE.items():
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_bytes(data)
    (plain / "modeling_own.py").write_text("raise SystemExit")
    (plain / "pytorch_model.bin").write_bytes(b"a pickle")
    cache = folder / "snapshot"
    cache.mkdir()
    for path in plain.iterdir():
        (cache / path.name).symlink_to(path)
    return cache


@pytest.fixture(scope="module")
def imported(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("imported") / "run"
    assert main(["import", "--from", str(odd), f"run.dir={run}"]) == 0
    return run


def test_what_belongs_to_the_weights_is_carried(odd: Path, imported: Path, tmp_path: Path) -> None:
    succeeds("export", "--run", str(imported), "--to", str(tmp_path / "out"))
    for name, data in BESIDE.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert not list((tmp_path / "out").glob("*.py")) and not list((tmp_path / "out").glob("*.bin"))
    before, after = raw(odd), raw(tmp_path / "out")
    del before["model.layers.0.self_attn.rotary_emb.inv_freq"]  # follows from the configuration
    assert after == before and {one[0] for one in after.values()} == {"BF16", "F32"}
    assert "lm_head.weight" in after
    source = read_source(imported / "model_source")
    assert source is not None and set(source.files) == {*BESIDE, "config.json"}


@pytest.mark.parametrize(("dtype", "code"), [("bfloat16", "BF16"), ("float16", "F16"), ("float64", "F64")])
def test_another_dtype_is_of_all_tensors_and_of_the_configuration(
    dtype: str, code: str, imported: Path, tmp_path: Path
) -> None:
    succeeds("export", "--run", str(imported), "--to", str(tmp_path / "out"), "--dtype", dtype)
    assert {one[0] for one in raw(tmp_path / "out").values()} == {code}
    keys = json.loads((tmp_path / "out/config.json").read_text())
    assert keys["dtype"] == keys["torch_dtype"] == dtype
    tokens = torch.randint(SIZES["vocab_size"], (1, 20))
    assert logits(tmp_path / "out", tokens).isfinite().all()


def test_a_file_that_was_changed_since_is_no_export(imported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    (run / "model_source/chat_template.jinja").write_text("{{ other }}")
    assert main(["export", "--run", str(run), "--to", str(tmp_path / "out")]) == StorageError.exit_code
    shutil.rmtree(run / "model_source")
    shutil.copytree(imported / "model_source", run / "model_source")
    record = run / "model_source/source.json"
    record.write_text(record.read_text().replace("chat_template.jinja", "../../../.ssh/id_rsa"))
    assert main(["export", "--run", str(run), "--to", str(tmp_path / "out")]) == StorageError.exit_code
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_and_another_begins_from_it(
    tmp_path: Path, imported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(imported, tmp_path / "run")
    write_tokens(tmp_path / "corpus.bin", [list(range(n, n + 40)) for n in range(40)])
    data = ["data=tokens", "data.path=corpus.bin", "data.seq_len=32", "train.global_batch=2", "optim.lr=1e-30"]
    own = ["comm=sim", "logger=none", "train.canary=false", "train.steps=1", "optim.weight_decay=0"]
    meshes = (["parallel.pp=2", "parallel.pp_schedule=gpipe"], ["parallel.sp=2", "parallel.tp=2"])
    succeeds("train", "--resume=run", *data, *own, *meshes[0])
    source = ["model=hf", "model.path=run/model_source", "init.from=run/checkpoints/step-0"]
    succeeds("train", "run.dir=other", *source, *data, *own, *meshes[1])
    for run in ("run", "other"):
        succeeds("export", "--run", run, "--to", f"{run}-out")
    assert raw(tmp_path / "run-out") == raw(tmp_path / "other-out")
    assert (tmp_path / "other-out/chat_template.jinja").read_bytes() == BESIDE["chat_template.jinja"]


REFUSED: dict[str, tuple[Any, str]] = {
    "head": (lambda tensors: tensors["lm_head.weight"].add_(1.0), "is not the embedding"),
    "missing": (lambda tensors: tensors.pop("model.norm.weight"), "missing model.norm.weight"),
    "unknown": (lambda tensors: tensors.update({"model.extra": torch.ones(2)}), "unknown model.extra"),
    "shape": (lambda tensors: tensors.update({"model.norm.weight": torch.ones(2)}), "model.norm.weight is [2]"),
    "integers": (lambda tensors: tensors.update({"model.norm.weight": torch.ones(48).int()}), "weights are real"),
    "nan": (lambda tensors: tensors["model.norm.weight"].fill_(torch.nan), "not finite"),
    "wide": (lambda tensors: tensors.update({"model.norm.weight": torch.ones(48).double()}), "train.dtype=float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_would_be_others_are_refused(
    case: str, odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, told = REFUSED[case]
    directory = tmp_path / "m"
    shutil.copytree(odd, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert main(["import", "--from", str(directory), f"run.dir={tmp_path / 'run'}"]) not in (0, 2)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints/step-0").exists()


def test_an_occupied_target_stays_and_a_failure_leaves_none(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("x")
    assert main(["export", "--run", str(imported), "--to", str(target)]) == 78
    assert "is not empty" in capsys.readouterr().err and [path.name for path in target.iterdir()] == ["mine"]
    assert main(["import", "--from", str(tmp_path), f"run.dir={imported}"]) == 65
    monkeypatch.setattr("longctx.huggingface.writing.export.copy_files", lambda *_: 1 / 0)
    assert main(["export", "--run", str(imported), "--to", str(tmp_path / "other")]) == 70
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ranks_share_all_tensors_evenly() -> None:
    tensors = {str(n): Brought((n + 1, 7), torch.float32, lambda: torch.ones(1)) for n in range(40)}
    for world in (1, 2, 7, 50):
        shares = share(tensors, world)
        assert sorted(name for one in shares for name in one) == sorted(tensors)
        sizes = [sum(tensors[name].bytes for name in one) for one in shares]
        assert max(sizes) - min(sizes) <= max(one.bytes for one in tensors.values())
