"""The top level of the repository, and that its pins agree with one another."""

import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_every_installed_dependency_is_pinned_once():
    pinned = constraints()
    extras = PROJECT["optional-dependencies"]
    for requirement in [*extras["test"], *extras["lint"], *extras["track"], *extras["docs"]]:
        name, version = requirement.lower().split("==")
        assert pinned[name] == version, requirement


def test_what_is_pinned_lies_in_the_ranges_of_those_who_install_it_beside_others():
    pinned, page = constraints(), (ROOT / "docs/howto/install.md").read_text(encoding="utf-8")
    for dependency in map(Requirement, PROJECT["dependencies"]):
        assert pinned[dependency.name.lower()] in dependency.specifier, dependency
        assert not any(one.operator == "==" for one in dependency.specifier), dependency
        assert dependency.name in page
    for extra in PROJECT["optional-dependencies"]:
        assert f"`{extra}`" in page


def test_the_outer_folders_enter_the_package_as_committed_links():
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "longctx"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    for folder in ("kernels", "launcher", "conf", "slurm"):
        link = ROOT / "longctx" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder
        if listed:
            assert re.search(rf"^120000 .*\tlongctx/{folder}$", listed, re.MULTILINE)


def test_nothing_names_a_package_registry():
    for name in ("Makefile", "constraints.txt", "pyproject.toml", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"index-url|pypi\.|https?://(?!www\.apache)", text), name


def test_ci_runs_the_tests_by_make():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert script.startswith("#!/usr/bin/env bash")
    assert "set -euo pipefail" in script
    assert "make test" in script
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
