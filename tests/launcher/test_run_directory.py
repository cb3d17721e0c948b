"""config.yaml is data: written whole, read strictly."""

from pathlib import Path

import pytest

from longctx.config import Config
from longctx.errors import ConfigError, LongctxError, StorageError
from longctx.launcher.run_directory import open_directory, read_config, with_directory


def test_what_is_written_is_read_back(tmp_path):
    mapping = {
        "run": {"dir": str(tmp_path / "a"), "name": "$(touch x): é #"},
        "optim": {"eps": 1e-12, "lr": 1},
    }
    config = Config.from_dict(mapping)
    directory = open_directory(config, resume=False)
    assert read_config(directory / "config.yaml") == config
    assert [file.name for file in directory.iterdir()] == ["config.yaml"]


def test_directories_by_the_clock_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = set()
    for _ in range(3):
        config = with_directory(Config())
        open_directory(config, resume=False)
        names.add(config.run.dir)
    assert len(names) == 3
    assert with_directory(Config(), "17").run.dir == "runs/job-17"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "a key stands twice"),
        ("train: &a\n  steps: 1\nrun: *a\n", "aliases are not allowed"),
        ("run: !!python/object/apply:os.system ['touch canary']\n", "not plain YAML"),
        ("train: [1\n", "not plain YAML"),
        ("[" * 10_000, "not plain YAML"),
        ("", "must be a mapping"),
        ("train:\n  stps: 1\n", "did you mean train.steps?"),
        ("? [a, b]\n: 1\n", ""),
    ],
)
def test_anything_but_plain_data_is_refused(text, words, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_config(file)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path("canary").exists()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(StorageError, match=r"config\.yaml cannot be read"):
        read_config(tmp_path / "config.yaml")
    (tmp_path / "latin").write_bytes(b"run:\n  name: \xe9\n")
    with pytest.raises(LongctxError):
        read_config(tmp_path / "latin")
    (tmp_path / "large").write_bytes(b"# " + b"x" * (1 << 20))
    with pytest.raises(ConfigError, match="at most 1 MiB"):
        read_config(tmp_path / "large")
