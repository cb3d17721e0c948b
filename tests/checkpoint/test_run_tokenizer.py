"""A run keeps its tokenizer, records its digest, and goes on with no other one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from longctx.data.tokenizer import open_tokenizer
from longctx.data.tokenizing import build as tokenizing
from longctx.errors import ConfigError
from longctx.launcher import build
from longctx.launcher.resuming import Resume
from longctx.launcher.start.checking import open_checked_directory
from tests.data.test_tokenize import Inline
from tests.data.tokenizers_of_tests import parts_of, saved
from tests.train.small_run import small_config


def test_a_run_goes_on_with_its_own_tokenizer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizing, "EncodingWorkers", Inline)
    place = saved(tmp_path / "tokenizer")
    (place / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "text.txt").write_text("some words of text " * 99)
    data = {"source": "text", "path": str(tmp_path / "text.txt"), "tokenizer": str(place), "eos": True}
    train = {"steps": 1, "canary": False}
    sections = {"model": {"vocab_size": 608}, "checkpoint": {"at_end": True}, "optim": {"warmup_steps": 0}}
    config = small_config(tmp_path / "run", data=data, train=train, **sections)
    open_checked_directory(config, None, 1)
    build.run_sim(config, None)
    digest = open_tokenizer(place).content + "+eos=0"
    (state,) = (tmp_path / "run/checkpoints").glob("step-1/state*.json")
    assert f'"tokenizer": "{digest}"' in state.read_text().replace('":"', '": "')
    facts = json.loads((tmp_path / "run/environment.json").read_text())["data"]["tokenizer"]
    assert (facts["digest"], facts["eos"], facts["vocab_size"]) == (digest, True, 600)
    kept = sorted(path.name for path in (tmp_path / "run/tokenizer").iterdir())
    assert kept == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]

    assert build.preflight(config, Resume()) == 1
    own = replace(config, data=replace(config.data, tokenizer=str(tmp_path / "run/tokenizer")))
    assert build.preflight(own, Resume()) == 1  # it is the same one, wherever it lies
    parts = parts_of()
    parts["model"]["merges"].pop()
    other = saved(tmp_path / "other", parts)
    encoded = tokenizing.build
    monkeypatch.setattr(tokenizing, "build", None)  # nothing is tokenized before it is refused
    for changes in ({"tokenizer": str(other)}, {"eos": False}, {"tokenizer": None, "eos": False}):
        changed = replace(config, data=replace(config.data, **changes))  # type: ignore[arg-type]
        now = open_tokenizer(changed.data.tokenizer).content
        with pytest.raises(ConfigError, match=r"data\.tokenizer: ") as refused:
            build.preflight(changed, Resume())
        assert digest in str(refused.value) and now in str(refused.value) and refused.value.exit_code == 78
    # What stands in the checkpoint holds where the run's own copy is lost.
    monkeypatch.setattr(tokenizing, "build", encoded)
    (tmp_path / "run/tokenizer/tokenizer.json").unlink()
    changed = replace(config, data=replace(config.data, eos=False))
    content = digest.removesuffix("+eos=0")
    with pytest.raises(ConfigError, match=rf"data\.tokenizer: '{content}\+eos=0' in the checkpoint, '{content}' now"):
        build.preflight(changed, Resume())
