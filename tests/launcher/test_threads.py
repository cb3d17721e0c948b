"""Threads sleep while they wait, in every command: the setting is read when torch is imported, so it comes first."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# torch itself takes seconds to import: that somebody asks for it is enough.
PROGRAM = """
import contextlib, importlib, importlib.abc, io, os, sys
THREADS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
class Asked(BaseException): pass
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise Asked([variable for variable in THREADS if variable not in os.environ])
sys.meta_path.insert(0, Watch())

def missing(call):
    for variable in THREADS:
        os.environ.pop(variable, None)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call()
    except Asked as asked:
        return asked.args[0]
    return None

from longctx.launcher import cli, worker
import shlex, longctx.launcher.env as env
found = {}
for command in cli.COMMANDS:
    for example in command.examples:
        words = shlex.split(example)
        words = words[words.index("longctx") + 1:] if "longctx" in words else words[words.index("-m") + 2:]
        words = words if words[0] in [c.name.split()[0] for c in cli.COMMANDS] else ["train", *words]
        found[example] = missing(lambda: cli.main(words))
import benchmarks.__main__
for name in benchmarks.__main__.BENCHES:
    found[f"python -m benchmarks {name}"] = missing(lambda: benchmarks.__main__.main([name]))
for module in MODULES:
    for name in [name for name in sys.modules if name.startswith(("benchmarks.tables", "docs"))]:
        del sys.modules[name]
    env._shared.clear()
    found[f"python -m {module}"] = missing(lambda: importlib.import_module(module))
assert [c for c in found.values() if c == []], "nobody imports torch: this test sees nothing"
print(*(f"{who}: {what}" for who, what in found.items() if what), sep="\\n")
"""
MODULES = tuple(f"benchmarks.tables.{file.stem}" for file in (ROOT / "benchmarks/tables").glob("[a-z]*.py"))


def test_every_command_sets_its_threads_before_torch_is_imported():
    assert MODULES
    program = f"MODULES = {MODULES!r}\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")
