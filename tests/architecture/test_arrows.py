"""Who may import whom. A new part of the package states its arrows here first."""

import ast
from graphlib import CycleError, TopologicalSorter

from tests.architecture.source_tree import imports, modules, names, with_benchmarks

# errors may be used everywhere and config only where it is listed; launcher sees everything. catalog names objects of
# every part in words and imports none of them.
ARROWS = {
    "": set(),
    "errors": set(),
    "other_names": set(),
    "rules": {"other_names"},
    "ambient": set(),
    "catalog": {"rules"},
    "options": {"rules"},
    "rope": set(),
    "config": {"catalog", "options", "rules", "other_names", "rope"},
    "sim": set(),
    "sequence": {"catalog", "rules", "ambient"},
    "operators": {"ambient"},
    "planner": set(),
    "comm": set(),
    "mesh": {"config"},
    "attention": {"sequence", "comm", "planner", "catalog", "options", "rules", "operators", "ambient"},
    "linear": {"sequence", "comm", "attention", "catalog", "operators", "rules", "ambient"},
    "sparse": {"sequence", "comm", "attention", "linear", "operators", "rules"},
    "kernels": {"sequence", "attention", "linear"},
    "model": {"sequence", "attention", "linear", "config", "rope"},
    "parallel": {"sequence", "attention", "linear", "comm", "mesh", "model", "config"},
    "engines": {"sequence", "attention", "comm", "mesh", "model", "parallel", "config", "catalog"},
    "data": {"sequence", "planner", "config", "catalog", "rules"},
    "verify": {"sequence", "comm", "attention", "linear", "options", "operators"},
    "bench": {
        "sequence", "operators", "comm", "attention", "verify", "engines", "reporting", "train", "config", "catalog",
    },
    "checkpoint": {"mesh", "parallel", "data", "config"},
    "huggingface": {"checkpoint", "model", "config", "rope"},
    "reporting": {
        "sequence", "attention", "operators", "comm", "mesh", "model", "parallel", "engines", "checkpoint", "config",
        "rules",
    },
    "train": {
        "sequence", "attention", "linear", "comm", "mesh", "model", "parallel", "engines", "data", "checkpoint",
        "reporting", "config", "catalog", "rope",
    },
    "evaluate": {
        "sequence", "attention", "linear", "comm", "mesh", "model", "parallel", "data", "train", "config",
    },
    "integrations": {"sequence", "attention", "comm", "huggingface", "rules"},
}  # fmt: skip

# Parts whose neighbours they may know only by what those promise, not by how they keep it.
PROMISES = {
    ("model", "attention"): {"longctx.attention", "longctx.attention.core", "longctx.attention.runtime.local_kernel"},
    ("kernels", "attention"): {"longctx.attention.runtime.local_kernel", "longctx.attention.runtime.partial"},
}

# `python -m longctx.train` is a door into the launcher that lies inside the package for its name's sake.
DOORS = {"longctx.train.__main__"}

# sim stands for a cluster, so it stays as free of the package as a network would be.
NOTHING_OF_OURS = {"sim", "errors"}


def test_every_part_states_its_arrows():
    parts = {module.unit for module in modules()} - {"launcher"}
    assert parts <= set(ARROWS), f"state the arrows of {sorted(parts - set(ARROWS))} in ARROWS"


def test_imports_follow_the_arrows():
    wrong = []
    for module in modules():
        if module.unit == "launcher" or module.name in DOORS:
            continue
        allowed = ARROWS[module.unit] | {module.unit, ""}
        if module.unit not in NOTHING_OF_OURS:
            allowed = allowed | {"errors"}
        for one in imports(module):
            unit = f"{one.target}.".split(".")[1]
            if unit not in allowed:
                wrong.append(f"{module.where}:{one.line} imports {one.target}; {module.unit} may use {sorted(allowed)}")
    assert not wrong, "\n".join(wrong)


def test_the_package_knows_no_benchmark():
    """Benchmarks lie beside the package: they may import all of it, and it is installed without them."""
    wrong = [
        f"{module.where}:{one.line} imports {one.target}"
        for module in modules()
        for one in imports(module, "benchmarks")
    ]
    assert not wrong, "\n".join(wrong)
    assert any(list(imports(module)) for module in with_benchmarks() if module.unit == "benchmarks")


def test_the_planner_is_free_of_torch():
    """It runs where no accelerator and no torch is, and on the host while devices compute."""
    wrong = [
        f"{module.where}:{node.lineno}"
        for module in modules()
        if module.unit == "planner"
        for node in ast.walk(module.tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [getattr(node, "module", None) or ""]
        )
        if name.split(".")[0] == "torch"
    ]
    assert not wrong, wrong


def test_some_neighbours_are_known_only_by_their_promises():
    wrong = [
        f"{module.where}:{one.line} imports {one.target}"
        for module in modules()
        for one in imports(module)
        for (unit, other), promised in PROMISES.items()
        if module.unit == unit and one.target.startswith(f"longctx.{other}") and one.target not in promised
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_waits_for_itself():
    """No cycle among the imports that run at import time, package files included."""
    graph = {}
    for module in modules():
        needs = set()
        for one in imports(module):
            if not one.at_start:
                continue
            parts = one.target.split(".")
            # Importing a.b.c runs a and a.b first, unless we are inside them and they run already.
            chain = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            needs |= {name for name in chain if not f"{module.name}.".startswith(f"{name}.")}
        graph[module.name] = needs & names()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        raise AssertionError(" -> ".join(cycle.args[1])) from None
