"""The wheel works without the checkout: one top-level name, everything inside it."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USE_FROM_ELSEWHERE = """
import longctx, longctx.launcher.compose, longctx.kernels, longctx.sequence
from longctx.launcher.commands.submit import prepare, render
config = longctx.launcher.compose.compose(["recipe=demo", "parallel.sp=1", "run.dir=runs/demo"])
assert "srun" in render(prepare(config))
print(longctx.__file__)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packed, since setuptools writes beside pyproject.toml; links stay links."""
    source = tmp_path_factory.mktemp("source")
    kept = ["pyproject.toml", "LICENSE", "README.md", "longctx", "launcher", "kernels", "conf", "slurm", "benchmarks"]
    present = [name for name in kept if (ROOT / name).exists()]
    subprocess.run(["cp", "-a", *present, str(source)], cwd=ROOT, check=True)
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
            "--wheel-dir", str(folder), str(source),
        ],
        check=True,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_one_name_with_code_configuration_and_templates(source, wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"longctx"}
    expected = [
        str(file.relative_to(source))
        for entry in (source / "longctx").iterdir()
        for pattern in ("*.py", "*.yaml", "*.sbatch", "*.env", "*.jinja", "*.css", "py.typed")
        for file in ([entry] if entry.is_file() else entry.rglob(pattern))
        if file.match(pattern)
    ]
    assert set(expected) <= set(names), sorted(set(expected) - set(names))
    assert not [name for name in names if name.endswith((".pyc", ".orig"))]
    assert not [name for name in names if "benchmarks" in name.split("/")]
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert re.search(r"Requires-Dist: torch[<>=!,. 0-9]*>=2\.11", metadata)


def test_it_runs_outside_the_checkout(wheel, tmp_path):
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}

    def run(*words):
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    used = run("-c", USE_FROM_ELSEWHERE)
    assert used.stdout.strip() == str(unpacked / "longctx/__init__.py"), used.stderr
    helped = run("-m", "longctx.launcher.cli", "--help")
    assert helped.returncode == 0
    assert "verify" in helped.stdout
    refused = run("-m", "longctx.launcher.cli", "train", "attention=stripd")
    assert (refused.returncode, refused.stderr.count("\n")) == (78, 1)


def test_the_console_script_is_declared(wheel):
    archive = zipfile.ZipFile(wheel)
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "longctx = longctx.launcher.cli:main" in archive.read(entry).decode()
