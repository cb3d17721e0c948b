"""Run in a copy of the package with all toys: uses each the way users do, and prints what came of it as JSON."""

import contextlib
import io
import json
import sys
from pathlib import Path

from longctx.attention.runtime.registry import costs_of, get_strategy
from longctx.config import Config
from longctx.launcher.cli import main
from longctx.launcher.hydra.groups import groups


def said(*words: str) -> tuple[int, str]:
    """The exit code of ``longctx``, and what it printed."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(list(words))
    return code, out.getvalue() + errors.getvalue()


def verified(*words: str) -> dict:
    code, text = said("verify", "--documents", "20,1,43", "--head-dim", "8", "--json", *words)
    return {"code": code, "verdict": json.loads(text) if text.startswith("{") else text}


def trained(folder: Path, *words: str) -> dict:
    quiet = ["logger.wandb=disabled", "logger.report=false", "logger.progress=false", "data.seq_len=64"]
    small = ["model.dim=16", "model.heads=2", "model.kv_heads=2", "model.head_dim=8", "model.layers=2"]
    code, text = said("train", "comm=sim", "parallel.sp=2", f"run.dir={folder}", *quiet, *small, *words)
    records = folder / "metrics.jsonl"
    losses = [json.loads(line)["loss"] for line in records.read_text().splitlines()] if records.exists() else []
    rates = [json.loads(line)["lr"] for line in records.read_text().splitlines()] if records.exists() else []
    return {"code": code, "losses": losses, "text": text, "rates": rates}


def results(root: Path) -> dict:
    toys = ["recipe=toy", "attention.toy_heads=1", "attention.layout=backwards", "attention.kernel=toy_kernel"]
    toys += ["optim.schedule=toy_schedule", "optim.warmup_steps=0"]
    hybrid = ["model.pattern=LS", "model.mixer=toy_mixer", "attention.linear=toy_linear"]
    return {
        "strategy": verified("--strategy", "toy", "--toy-heads", "1", "--world", "3"),
        "linear": verified("--strategy", "toy_linear", "--mixer", "toy_mixer", "--world", "3"),
        "layout": verified("--strategy", "ring", "--layout", "backwards", "--world", "3"),
        "kernel": verified("--strategy", "ring", "--kernel", "toy_kernel", "--world", "2"),
        "option of another": said("verify", "--strategy", "ring", "--toy-heads", "1"),
        "option misspelt": said("train", "attention.toy_head=1"),
        "option too small": said("train", "attention=toy", "attention.toy_heads=0"),
        "engine refuses": said("train", "engine=toy_engine", "parallel.pp=2", "model.layers=4", "parallel.sp=1"),
        "trained": trained(root / "toys", *toys, *hybrid, "engine=toy_engine", "optim=toy_sgd"),
        "trained alone": trained(root / "alone", *toys, *hybrid, "parallel.sp=1", "engine=native", "optim=toy_sgd"),
        "model option": trained(root / "scaled", "recipe=toy", "model.toy_scale=2.0", "train.steps=1"),
        "no model option": trained(root / "plain", "recipe=toy", "train.steps=1"),
        "command": said("toy", "--word", "hello"),
        "groups": groups(),
        "costs": costs_of(get_strategy("toy")),
        "keys": {name: list(section) for name, section in Config().to_dict().items()},
    }


if __name__ == "__main__":
    print(json.dumps(results(Path(sys.argv[1]))))
