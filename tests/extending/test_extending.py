"""Each thing is added where CONTRIBUTING says, in as many files as it says, and works everywhere by that."""

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.extending.extensions import EXTENSIONS, Extension

ROOT = Path(__file__).parents[2]
PACKED = ("longctx", "launcher", "kernels", "conf", "slurm")


def copy_of_package(root: Path) -> Path:
    for name in PACKED:
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The package with all toys added."""
    root = copy_of_package(tmp_path_factory.mktemp("package"))
    for extension in EXTENSIONS.values():
        extension.apply(root)
    return root


@pytest.fixture(scope="module")
def found(package, tmp_path_factory) -> dict:
    """What ``use_toys`` says of it, from a process of its own that sees this copy alone."""
    script = ROOT / "tests/extending/use_toys.py"
    environment = {**os.environ, "PYTHONPATH": str(package)}
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-P", str(script), str(folder)]
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def diff_of(extension: Extension, root: Path) -> tuple[int, dict[str, int]]:
    """Lines of new files, and by existing file how many lines were added; none is changed or removed."""
    added: dict[str, int] = {}
    for name in extension.lines:
        before, after = ((one / name).read_text().splitlines() for one in (ROOT, root))
        changes = [line for line in difflib.ndiff(before, after) if line[:2] in ("+ ", "- ")]
        assert all(line.startswith("+ ") for line in changes), changes
        added[name] = len(changes)
    return sum(len((root / name).read_text().splitlines()) for name in extension.files), added


def documented() -> dict[str, tuple[int, int]]:
    """From CONTRIBUTING's table: thing -> new files, lines added to existing ones."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Adding things")[2]
    rows = re.findall(r"^\| (?:an? )?([\w ]+?) \| (\d) \| (\d) \|", page.partition("\n## ")[0], re.MULTILINE)
    return {name: (int(files), int(lines)) for name, files, lines in rows}


def test_contributing_counts_every_kind():
    assert set(documented()) == set(EXTENSIONS)


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_it_takes_as_many_files_and_lines_as_contributing_says(kind, tmp_path):
    extension = EXTENSIONS[kind]
    for name in {*extension.files, *extension.lines}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name in extension.lines:
            shutil.copy(ROOT / name, tmp_path / name)
    extension.apply(tmp_path)
    written, added = diff_of(extension, tmp_path)
    assert (len(extension.files), sum(added.values())) == documented()[kind]
    assert len(extension.files) + len(added) <= 2
    assert written > 0 or added


@pytest.mark.parametrize("case", ["strategy", "linear", "layout", "kernel"])
def test_verify_knows_it_and_it_is_exact(found, case):
    assert found[case]["code"] == 0, found[case]
    assert found[case]["verdict"]["passed"] and found[case]["verdict"]["refused"] is None
    assert sum(found[case]["verdict"]["bytes_forward"]) > 0


def test_a_strategy_needs_no_costs(found):
    assert found["costs"] is None


def test_an_option_is_a_key_and_a_flag_and_is_refused_where_nobody_reads_it(found):
    assert "toy_heads" in found["keys"]["attention"] and "toy_scale" in found["keys"]["model"]
    code, text = found["option of another"]
    assert code == 78 and "attention.toy_heads=1: it has no such choice; leave it at null" in text
    code, text = found["option misspelt"]
    assert code == 78 and "did you mean attention.toy_heads?" in text
    code, text = found["option too small"]
    assert code == 78 and "attention.toy_heads=0 must be at least 1" in text


def test_all_of_them_train_together_as_one_rank_alone(found):
    toys, alone = found["trained"], found["trained alone"]
    assert toys["code"] == alone["code"] == 0, (toys["text"], alone["text"])
    assert toys["text"].count("the toy engine stepped") == 2 * 2
    assert toys["losses"] == pytest.approx(alone["losses"], rel=1e-5) and len(toys["losses"]) == 2
    assert toys["rates"] == [3e-3, 1.5e-3]


def test_an_engine_refuses_by_its_own_words(found):
    code, text = found["engine refuses"]
    assert code == 78 and "engine=toy_engine refuses: parallel.pp=2; nearest valid: parallel.pp=1" in text


def test_a_model_option_is_read(found):
    assert found["model option"]["losses"] and found["no model option"]["losses"]
    assert found["model option"]["losses"] != found["no model option"]["losses"]


def test_names_are_options_of_their_groups(found):
    groups = found["groups"]
    assert "toy" in groups["attention"] and "toy_linear" in groups["attention"] and "toy" in groups["recipe"]
    assert "toy_source" in groups["data"] and "toy_engine" in groups["engine"] and "toy_sgd" in groups["optim"]


def test_a_command_is_in_the_table(found):
    assert found["command"] == [0, "hello\n"]
