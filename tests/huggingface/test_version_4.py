"""Configurations as transformers 4.57 writes them go in as those of 5 do, and exports are read by both."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.config import ModelConfig
from longctx.huggingface.writing.config_out import config_of, model_of
from longctx.launcher.cli import main
from tests.huggingface.small_models import CASES, published, saved
from tests.huggingface.tables import ours, same, theirs, transformers

FIXTURES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "fixtures/transformers_4.57.json").read_text(encoding="utf-8")
)
ROOT = Path(__file__).parents[2]
LENGTHS = (50, 200)  # below and above the original


def written(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", FIXTURES)
def test_a_configuration_of_4_is_the_one_of_5(name: str, tmp_path: Path) -> None:
    directory = written(tmp_path / "4", FIXTURES[name])
    transformers.AutoConfig.from_pretrained(directory).save_pretrained(tmp_path / "5")
    new = json.loads((tmp_path / "5/config.json").read_text())
    assert "rope_parameters" in new
    model = model_of(FIXTURES[name], "4")
    assert model_of(new, "5") == model
    for length in LENGTHS:
        assert same(ours(model, length), theirs(directory, length, model.kinds))


@pytest.mark.parametrize("name", FIXTURES)
def test_what_is_written_holds_both_forms_and_both_are_the_model(name: str, tmp_path: Path) -> None:
    model = model_of(FIXTURES[name], "4")
    found = config_of(model, 128, FIXTURES[name], "bfloat16")
    assert not found.notes
    keys = found.keys
    assert keys["dtype"] == keys["torch_dtype"] == "bfloat16"
    old = {key: value for key, value in keys.items() if key != "rope_parameters"}
    new = {key: value for key, value in keys.items() if key not in ("rope_scaling", "rope_theta")}
    assert _without_rope(model_of(old, "old")) == _without_rope(model_of(new, "new")) == _without_rope(model)
    for number, form in enumerate((keys, old, new)):
        directory = written(tmp_path / str(number), form)
        for length in LENGTHS:
            expected = ours(model, length)
            assert same(ours(model_of(form, "written"), length), expected)
            assert same(theirs(directory, length, model.kinds), expected)


@pytest.mark.matrix
def test_transformers_4_computes_the_same_of_exports(tmp_path: Path) -> None:
    python = ROOT / "build/transformers-4/bin/python"
    if not python.exists():
        pytest.skip("make matrix installs transformers 4.57")
    tokens = torch.randint(96, (1, 48), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    names = [name for name, (kind, _) in CASES.items() if is_in_version_4(kind)]
    assert len(names) >= 8
    for name in names:
        directory, run = saved(name, tmp_path / "in"), tmp_path / "runs" / name.replace(" ", "-")
        assert main(["import", "--from", str(directory), f"run.dir={run}"]) == 0
        assert main(["export", "--run", str(run), "--to", str(tmp_path / run.name)]) == 0
    script = ROOT / "tests/huggingface/version_4.py"
    subprocess.run([python, script, "logits", tmp_path], check=True, timeout=300, cwd=ROOT)
    for name in names:
        found = load_file(tmp_path / f"{name.replace(' ', '-')}.safetensors")["logits"]
        with torch.no_grad():
            assert torch.allclose(found, published(name)(tokens).logits, atol=2e-5), name


def is_in_version_4(kind: str) -> bool:
    """Whether transformers 4.57 has the class of a configuration."""
    return kind not in ("Qwen3_5TextConfig", "OlmoHybridConfig")


def _without_rope(model: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if not name.startswith("rope")}
