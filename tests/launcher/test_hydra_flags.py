"""Hydra's flags as people know them: a configuration is shown, own folders and files are read, the rest is refused."""

from pathlib import Path

import pytest
import yaml

from longctx.config import Config
from longctx.errors import ConfigError
from longctx.launcher import cli
from longctx.launcher.compose import compose

MINE = "# A model of one's own.\nname: mine\ndim: 64\n"
RECIPE = "# @package _global_\ndefaults:\n  - override /model: mine\ntrain:\n  steps: 7\n"


@pytest.fixture
def own(tmp_path):
    """A folder of options under a name that needs quotes, and a file beside it."""
    folder = tmp_path / "my own, [odd] = options"
    for name, text in {"model/mine": MINE, "recipe/mine": RECIPE}.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text, encoding="utf-8")
    return folder


def ran(capsys, *words):
    code = cli.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", ["train", "launch", "submit", "verify", "bench attention", "bench step"])
def test_every_command_that_takes_overrides_shows_the_configuration(capsys, command):
    code, out, err = ran(capsys, *command.split(), "--cfg", "job", "recipe=demo", "train.steps=9")
    assert (code, err) == (0, "")
    assert Config.from_dict(yaml.safe_load(out)) == compose(["recipe=demo", "train.steps=9"])


def test_resolve_adds_what_depends_on_processes_and_steps(capsys):
    words = ("--cfg=job", "parallel.sp=2", "train.steps=40")
    shown = yaml.safe_load(ran(capsys, "launch", *words)[1])
    resolved = yaml.safe_load(ran(capsys, "launch", "--resolve", "--nproc", "4", *words)[1])
    assert (shown["parallel"]["dp_shard"], shown["optim"]["warmup_steps"], shown["optim"]["decay_steps"]) == (
        -1,
        None,
        None,
    )
    assert (resolved["parallel"]["dp_shard"], resolved["optim"]["warmup_steps"]) == (2, 4)
    assert resolved["optim"]["decay_steps"] == 40


def test_own_options_lie_in_a_folder(capsys, own, monkeypatch):
    code, out, _ = ran(capsys, "train", "--cfg", "job", "--config-dir", str(own), "model=mine", "train.steps=3")
    assert code == 0 and yaml.safe_load(out)["model"]["dim"] == 64
    code, out, _ = ran(capsys, "train", "-c", "job", "-cd", str(own), "recipe=mine")
    assert yaml.safe_load(out)["train"]["steps"] == 7 and yaml.safe_load(out)["model"]["name"] == "mine"
    code, _, err = ran(capsys, "train", "--cfg", "job", "--config-dir", str(own), "model=mien")
    assert code == 78 and "did you mean mine?" in err
    monkeypatch.chdir(own.parent)
    assert compose([f"hydra.searchpath=['{own.name}']", "model=mine"]).model.dim == 64
    with pytest.raises(ConfigError, match="model=mine is not known"):
        compose(["model=mine"])


def test_a_file_of_ones_own_is_a_recipe(capsys, own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "try one.yaml"
    file.write_text("defaults:\n  - override /attention: striped\ntrain:\n  steps: 5\n  seed: 3\n", encoding="utf-8")
    config = compose([f"recipe={file}", "train.steps=6"])
    assert (config.attention.strategy, config.train.steps, config.train.seed) == ("striped", 6, 3)
    # What --cfg shows is a recipe, and so is a run's config.yaml.
    shown = ran(capsys, "train", "--cfg", "job", "model=small", "attention.window=5")[1]
    Path("shown.yaml").write_text(shown, encoding="utf-8")
    assert compose(["recipe=shown.yaml"]) == compose(["model=small", "attention.window=5"])
    with pytest.raises(ConfigError, match=r"did you mean recipe=shown\.yaml"):
        compose(["recipe=shown"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("recipe/bare.yaml", "train:\n  steps: 7\n", ["# @package _global_"]),
        ("recipe/wrong.yaml", "# @package _global_\ntrain:\n  stepz: 7\n", ["stepz"]),
        ("recipe/reads.yaml", "# @package _global_\nrun:\n  name: ${oc.env:HOME}\n", ["run.name", "interpolation"]),
        ("recipe/broken.yaml", "a: [1\n", ["cannot be read", "broken.yaml"]),
        ("model/tiny.yaml", "dim: 8\n", ["model=tiny is longctx's own", "another name"]),
        ("modle/huge.yaml", "dim: 8\n", ["modle is not a group", "did you mean model?"]),
        ("train.yaml", "train: {}\n", ["is in no group", "recipe="]),
    ],
)
def test_an_own_file_that_would_not_be_read_is_refused(tmp_path, name, text, words):
    file = tmp_path / "own" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    choice = [f"{file.parent.name}={file.stem}"] if file.parent.name == "recipe" else []
    with pytest.raises(ConfigError) as refused:
        compose([f"hydra.searchpath=[{tmp_path / 'own'}]", *choice])
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stepz: 7}", ["train.stepz", "did you mean train.steps?"]),
        ("run: {name: '${oc.env:HOME}'}", ["interpolation"]),
        ("- 1", ["must hold sections"]),
        ("", ["must hold sections"]),
        ("a: [1", ["is not YAML"]),
        (None, ["cannot be read"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, words):
    file = tmp_path / "own.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        compose([f"recipe={file}"])
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(("words", "text"), [
    (["--config-dir", "nowhere"], "--config-dir nowhere is not a folder"),
    (["--config-dir", "."], "holds no option"),
    (["-m", "optim.lr=1e-3,3e-3", "model=small"],
     "for value in 1e-3 3e-3; do longctx train model=small optim.lr=$value run.dir=runs/a-$value; done"),
    (["--multirun"], "for value in 1e-3 3e-3; do longctx train optim.lr=$value"),
    (["-cn", "mine"], "recipe=FILE.yaml"),
    (["--config-path=x"], "--config-dir DIR"),
    (["--info"], "--cfg job"),
])  # fmt: skip
def test_what_is_not_used_here_is_refused_in_one_line(capsys, tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    code, out, err = ran(capsys, "train", *words)
    assert code in (2, 78) and out == "" and err.count("\n") == 1 and text in err


def test_the_loop_that_is_told_is_bash(capsys, tmp_path):
    import subprocess

    line = ran(capsys, "train", "-m", "optim.lr=1e-3,3e-3", "run.name=a b")[2].partition("shell: ")[2]
    done = subprocess.run(
        ["bash", "-c", f"longctx() {{ printf '%s|' \"$@\"; echo; }}; {line}"], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        f"train|run.name=a b|optim.lr={rate}|run.dir=runs/a-{rate}|" for rate in ("1e-3", "3e-3")
    ]
