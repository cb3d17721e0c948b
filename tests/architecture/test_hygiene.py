"""Taste and safety as tests: sizes, names, one reader of the environment, nothing that runs data as code."""

import ast
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import pytest

from longctx import catalog
from tests.architecture.source_tree import ROOT, Module, modules, with_benchmarks

LARGEST_FILE = 450
LARGEST_FUNCTION = 80
LARGEST_FOLDER = 20  # modules

# Unpicklers run what they read. Object collectives of torch pickle as well: send bytes in tensors.
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle",
}  # fmt: skip
FORBIDDEN_METHODS = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def complaints(check) -> str:
    return "\n".join(f"{module.where}:{line} {what}" for module in with_benchmarks() for line, what in check(module))


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(module: Module):
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            roots = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for root in roots:
                if root.split(".")[0] in FORBIDDEN_IMPORTS:
                    yield node.lineno, f"imports {root}"
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in FORBIDDEN_CALLS or called.rpartition(".")[2] in FORBIDDEN_METHODS:
                yield node.lineno, f"calls {called}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in FORBIDDEN_ARGUMENTS and value is FORBIDDEN_ARGUMENTS[keyword.arg]:
                    yield node.lineno, f"passes {keyword.arg}={value}"


def environment_readers(module: Module):
    if module.name == "longctx.launcher.env":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and dotted(node.value) == "os" and node.attr in ENVIRONMENT:
            yield node.lineno, f"uses os.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in ENVIRONMENT:
                    yield node.lineno, f"imports os.{alias.name}"


def simulation_askers(module: Module):
    if module.unit in ("sim", "config", "launcher", "verify", "benchmarks"):
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and node.value == "sim":
            yield node.lineno, "names the backend sim"


def oversized(module: Module):
    if module.lines > LARGEST_FILE:
        yield module.lines, f"lines; a file has at most {LARGEST_FILE}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LARGEST_FUNCTION:
                yield (
                    node.lineno,
                    f"{node.name} has {length} lines; a function has at most {LARGEST_FUNCTION}",
                )


def unexplained(module: Module):
    if not ast.get_docstring(module.tree) and module.lines:
        yield 1, "has no docstring that says what it is for"


def vague_names(module: Module):
    if module.path.stem in ("utils", "util", "helpers", "misc", "common"):
        yield 1, "is named after nothing; call it by what it holds"


@pytest.mark.parametrize(
    "check", [dangers, environment_readers, simulation_askers, oversized, unexplained, vague_names]
)
def test_hygiene(check):
    assert not complaints(check), "\n" + complaints(check)


def test_no_folder_is_too_full():
    folders = Counter(module.path.parent for module in with_benchmarks() if module.path.stem != "__init__")
    assert not {str(folder): count for folder, count in folders.items() if count > LARGEST_FOLDER}


def test_the_lint_sees_what_it_forbids():
    text = (
        "import pickle\nfrom os import environ\nimport os, torch, subprocess\n"
        "torch.load('x', weights_only=False)\neval('1')\nsubprocess.run('x', shell=True)\n"
        "os.environ['A']\ndist.broadcast_object_list([1])\n"
    )
    module = Module("longctx.bad", ROOT / "bad.py", ast.parse(text), 8)
    assert len(list(dangers(module))) == 6
    assert len(list(environment_readers(module))) == 2


def test_nothing_in_the_tree_is_generated_or_left_over():
    wrong = [
        str(file)
        for folder in ("longctx", "launcher", "kernels", "conf", "slurm", "benchmarks")
        for pattern in ("*.orig", "*.rej", "*.bak", "*.swp")
        for file in (ROOT / folder).rglob(pattern)
    ]
    assert not wrong


def test_importing_the_package_is_light():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import longctx"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "longctx" in imported
    assert not imported & {"hydra", "omegaconf", "wandb", "triton", "rich", "benchmarks"}


REGISTRIES = {name: one for name, one in vars(catalog).items() if isinstance(one, catalog.Registry)}


@pytest.mark.parametrize("registry", REGISTRIES)
def test_every_line_of_the_catalog_leads_to_an_object_of_that_name(registry):
    lines = REGISTRIES[registry]
    assert lines
    for name in lines:
        found = lines.load(name)
        assert getattr(found, "name", None) == name or getattr(found, "__name__", None) == name, (registry, name)


def test_no_name_stands_in_two_lists():
    assert not set(catalog.STRATEGIES) & set(catalog.LINEAR_STRATEGIES)


def test_what_recompute_may_keep_is_what_it_knows():
    from longctx.config.sections.train import KEEPABLE, RECOMPUTE
    from longctx.parallel.recompute import KEPT, KINDS

    assert set(KEEPABLE) == set(KINDS)
    assert set(RECOMPUTE) == {"none", *KEPT}


def test_what_objects_read_are_fields_of_their_section():
    from longctx.attention import get_strategy
    from longctx.config import DataConfig, ModelConfig
    from longctx.config.sections.linear import LinearConfig
    from longctx.linear import get_mixer
    from longctx.options import OPTIONS

    for name in catalog.STRATEGIES:
        grid = get_strategy(name).grid
        assert get_strategy(name).options <= set(OPTIONS), name
        assert grid is None or grid.option is None or grid.option in get_strategy(name).options, name
    for sections, registry in (((ModelConfig, LinearConfig), catalog.MIXERS), ((DataConfig,), catalog.SOURCES)):
        told = {one.name for section in sections for one in fields(section) if one.metadata.get("for_some")}
        assert set().union(*(registry.load(name).reads for name in registry)) == told
    assert all(get_mixer(name).has_states or get_mixer(name).reads for name in catalog.MIXERS)


BLOCKED = (
    "hydra", "omegaconf", "wandb", "triton", "flash_attn", "deepspeed", "megatron", "transformers",
    "matplotlib",
)  # fmt: skip

IMPORT_ALL = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{{name}}: {{type(error).__name__}}: {{error}}")
print("done")
"""


def test_the_library_imports_without_its_optional_companions():
    names = [m.name for m in modules() if m.unit != "launcher" and not m.name.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL.format(blocked=BLOCKED, names=names)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_a_configuration_is_read_without_torch_and_the_package_without_companions():
    """Nor does either import the objects behind names."""
    script = "import sys, longctx, longctx.config; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "longctx" in done.stdout
    for name in ("torch", "numpy", "benchmarks", *BLOCKED):
        assert f"'{name}'" not in done.stdout
