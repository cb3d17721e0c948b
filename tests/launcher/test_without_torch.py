"""Reading a configuration is quick: torch, which takes seconds to import, waits until a run is to start."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import contextlib, io, sys
from longctx.launcher import cli
from longctx.launcher.compose import compose
from longctx.config import resolve, simulated_world_size

for words in CASES:
    config = compose(words)
    resolve(config, simulated_world_size(config))
for words in REFUSED:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words)
    assert code == (0 if "--help" in words else 78), (words, code)
print(*(name for name in ("torch", "wandb", "triton") if name in sys.modules))
"""
# What a configuration commonly says: each kind of name, one mesh axis at least, every source.
CASES = (
    [],
    ["recipe=demo"],
    ["comm=sim", "parallel.sp=4", "attention=striped", "model=small"],
    ["comm=sim", "parallel.tp=2", "parallel.pp=2", "attention=gather", "train.global_batch=4"],
    ["data=text", "data.path=corpus", "data.text_key=content", "attention=local"],
    ["data=tokens", "data.path=corpus.tokens", "data.token_dtype=uint32", "comm=nccl", "train.dtype=bfloat16"],
    ["model.pattern=SL", "model.mixer=gla", "attention.linear=lasp2"],
)
REFUSED = (
    ["train", "data.seqlen=5"],
    ["train", "data=text"],
    ["train", "parallel.sp=2"],
    ["launch", "--nproc", "2", "train.global_batch=3"],
    ["submit", "cluster.nodes=0"],
    *([name, "--help"] for name in ("train", "launch", "submit")),
)


def test_neither_composing_nor_refusing_nor_helping_imports_torch():
    program = f"CASES, REFUSED = {CASES!r}, {REFUSED!r}\n{PROGRAM}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")
