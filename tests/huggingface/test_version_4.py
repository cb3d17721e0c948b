"""Configurations as transformers 4.57 writes them go in as those of 5 do, and exports are read by both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.config import ModelConfig
from longctx.huggingface.config_out import config_of, model_of
from tests.huggingface.tables import ours, same, theirs, transformers

FIXTURES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "fixtures/transformers_4.57.json").read_text(encoding="utf-8")
)
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


def _without_rope(model: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if not name.startswith("rope")}
