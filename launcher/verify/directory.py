"""``longctx verify --hf DIR`` compares a directory's model on a mesh with ``transformers``' own.

Both compute forward and backward of the same random tokens; ``transformers`` sees each document by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.checkpoint.state import live_tensors
from longctx.config import DEGREES, Config, resolve, simulated_world_size
from longctx.config.pipeline import RULES
from longctx.config.sections import DataConfig
from longctx.errors import ConfigError, UsageError
from longctx.huggingface.config_in import model_fields
from longctx.huggingface.joining import published_tensors
from longctx.huggingface.load import locate_parameters
from longctx.huggingface.reference.sample import draw_tokens
from longctx.huggingface.reference.step import Reference, ReferenceStep
from longctx.launcher import build, env, machine
from longctx.launcher.compose import compose_mapping, refuse_overrides
from longctx.launcher.hydra.overrides import quoted
from longctx.launcher.progress import progress
from longctx.launcher.verify.directory_ranks import Computed, compute
from longctx.launcher.verify.files import dump
from longctx.parallel.core import layout_of
from longctx.verify.case import DTYPES, ROUNDING_FACTOR, TOLERANCE, check_sample, document_lengths

PASSED, FAILED, REFUSED = 0, 70, 78
SEQ = 256
# A gradient's error is relative to its own norm plus this share of the whole gradient's: that of a bias of keys is
# nearly nothing but rounding.
FLOOR = 1e-3
# Flags say these, or the directory does.
FIXED = (
    "model", "model.name", "model.path", "train.dtype", "train.global_batch", "train.seed", "attention.window",
    "attention.document_mask",
)  # fmt: skip


@dataclass(frozen=True)
class DirectoryVerdict:
    """What ``longctx verify --hf`` prints; the fields are those of its JSON object.

    ``errors``: relative, of ``logits``, ``loss`` and ``grad.<Hugging Face name>``. ``reference``: what they are
    compared with. ``limits``: how large each may be.
    """

    directory: str
    family: str
    strategy: str
    layout: str
    mixer: str | None
    world: int
    backend: str
    mesh: dict[str, int]
    dtype: str
    reference: str
    refused: str | None
    errors: dict[str, float]
    limits: dict[str, float]
    passed: bool


def run(arguments: argparse.Namespace) -> int:
    """Compares, prints and dumps; returns the exit code."""
    if env.read_rank() is not None and not any("comm=sim" in word for word in arguments.overrides):
        raise UsageError("verify --hf starts its ranks itself; run it without torchrun or srun, for example comm=gloo")
    directory = Path(arguments.hf)
    model_fields(directory)  # bad data are told before any refusal
    documents = document_lengths(arguments.documents)
    seq = arguments.seq if arguments.seq is not None else sum(documents) or SEQ
    batch, seed = (default if one is None else one for one, default in ((arguments.batch, 1), (arguments.seed, 0)))
    try:
        check_sample(seq, documents, batch, seed)
        config = _config(arguments, seq, batch)
        if not any(length > 1 for length in documents or (seq,)):
            raise ConfigError("--documents of one token each have no successor to predict; make one longer")
        # Our readers say what is wrong with a file, before ranks start and before transformers meets it.
        locate_parameters(config.model, live_tensors(build.on_meta(config)))
        tokens = draw_tokens(directory, config.model.vocab_size, batch, seq, seed)
        dtype = DTYPES[config.train.dtype]
        reference = Reference(config.model, dtype, patched=dtype is torch.float64)
    except ConfigError as error:
        if not arguments.json:
            raise
        nothing: dict[str, Any] = dict.fromkeys(field.name for field in fields(DirectoryVerdict))
        print(
            json.dumps({**nothing, "directory": str(directory), "refused": str(error), "errors": {}, "passed": False})
        )
        return REFUSED
    with progress("longctx verify --hf") as report:
        report(0, 2, "the mesh")
        found = compute(config, tokens, documents or (seq,))
        report(1, 2, "transformers, each document by itself")
        expected = reference.step(tokens, documents or (seq,))
        verdict, tensors = judge(config, tokens, documents or (seq,), found, expected)
    if arguments.dump:
        dump(tensors, arguments.dump)
    _show(verdict, arguments.json)
    return PASSED if verdict.passed else FAILED


def _config(arguments: argparse.Namespace, seq: int, batch: int) -> Config:
    """Returns the resolved configuration, after all that training would refuse but for its data."""
    refuse_overrides(arguments.overrides, FIXED)
    for word in arguments.overrides:
        key = word.split("=")[0].lstrip("+~")
        if key.split(".")[0] == "data" or (key.startswith("model.") and not key.startswith("model.rope")):
            raise UsageError(f"{word}: verify --hf takes random tokens and the directory's own model; leave it out")
    dtype = arguments.dtype or "float64"
    if dtype == "bfloat16":
        raise ConfigError("--dtype bfloat16: models are compared in float32 or float64; nearest valid: float32")
    mapping = compose_mapping([*arguments.overrides, "model=hf", f"model.path={quoted(str(arguments.hf))}"])
    mapping["data"] = asdict(DataConfig(source="tokens", path="random", seq_len=seq))
    mapping["train"] |= {"dtype": dtype}
    config = Config.from_dict(mapping)
    machine.require_nodes(config)
    world = simulated_world_size(config)
    config = resolve(replace(config, train=replace(config.train, global_batch=fitting_rows(config, batch))), world)
    machine.require_devices(config, world)
    build.preflight_attention(config)
    build.preflight_kernel(config)
    return config


def fitting_rows(config: Config, batch: int) -> int:
    """Counts the rows that fall evenly on the mesh; those after ``batch`` will have no label."""
    parallel, rows = config.parallel, config.train.micro_batch
    groups = parallel.dp_replicate * max(parallel.dp_shard, 1)
    fits = RULES[parallel.pp_schedule].fits if parallel.pp > 1 else lambda pp, count: True
    count = next(count for count in itertools.count(-(-batch // (groups * rows))) if fits(parallel.pp, count))
    return groups * rows * count


def judge(
    config: Config, tokens: Tensor, documents: tuple[int, ...], found: Computed, expected: ReferenceStep
) -> tuple[DirectoryVerdict, dict[str, Tensor]]:
    """Returns the verdict, and what ``--dump`` writes."""
    import transformers

    model, dtype = config.model, DTYPES[config.train.dtype]
    assert model.path is not None, "the configuration names a directory"
    family, _, _ = model_fields(Path(model.path))
    gradients = published_tensors(found.gradients, model, family.names)
    ours = ReferenceStep(found.logits, torch.tensor(found.loss, dtype=torch.float64), gradients)
    errors = relative_errors(ours, expected)
    least, most = TOLERANCE[config.train.dtype]
    limits = dict.fromkeys(errors, least)
    if most > least and any(not error <= least for error in errors.values()):
        # What transformers itself loses to rounding.
        exact = Reference(model, torch.float64, patched=True).step(tokens, documents)
        own = relative_errors(expected, exact)
        limits = {name: min(max(least, ROUNDING_FACTOR * own.get(name, 0.0)), most) for name in errors}
    parts = "with its fp32 parts patched to float64" if dtype is torch.float64 else "as it is"
    verdict = DirectoryVerdict(
        directory=model.path,
        family=family.model_type,
        strategy=config.attention.strategy,
        layout=layout_of(config).name,
        mixer=model.mixer,
        world=simulated_world_size(config),
        backend=config.comm.backend,
        mesh={name: getattr(config.parallel, name) for name in DEGREES},
        dtype=config.train.dtype,
        reference=f"transformers {transformers.__version__} {parts}, each document by itself",
        refused=None,
        errors=errors,
        limits=limits,
        # A NaN compares false: it never passes.
        passed=all(error <= limits[name] for name, error in errors.items()),
    )
    dumped = {f"grad.{name}": whole for name, whole in gradients.items()}
    return verdict, {"tokens": tokens, "logits": found.logits.to(dtype), "loss": ours.loss, **dumped}


def relative_errors(found: ReferenceStep, expected: ReferenceStep) -> dict[str, float]:
    """Returns norms of differences over norms of what is expected, of all logits, the loss and each gradient.

    A gradient that only one side has is off by everything.
    """
    errors = {
        "logits": _relative(found.logits, expected.logits),
        "loss": _relative(found.loss, expected.loss),
    }
    floor = FLOOR * math.sqrt(sum(float(one.double().square().sum()) for one in expected.gradients.values()))
    for name in dict.fromkeys((*expected.gradients, *found.gradients)):
        own, other = found.gradients.get(name), expected.gradients.get(name)
        errors[f"grad.{name}"] = math.inf if own is None or other is None else _relative(own, other, floor)
    return errors


def _relative(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    if found.shape != expected.shape:
        return math.inf
    return float((found.double() - expected.double()).norm() / (expected.double().norm() + floor))


def _show(verdict: DirectoryVerdict, as_json: bool) -> None:
    if as_json:
        plain: Mapping[str, Any] = asdict(verdict)
        finite = {name: error if math.isfinite(error) else None for name, error in verdict.errors.items()}
        print(json.dumps({**plain, "errors": finite}, allow_nan=False))
        return
    degrees = " ".join(f"{name} {size}" for name, size in verdict.mesh.items() if size > 1) or "one rank"
    print(f"{verdict.directory} ({verdict.family}), {degrees} on {verdict.backend}, {verdict.dtype}")
    print(f"{verdict.strategy} on {verdict.layout}, against {verdict.reference}")
    for name, error in verdict.errors.items():
        limit = verdict.limits[name]
        print(f"  {name:48} relative error {error:.1e}{'' if error <= limit else f', above {limit:.0e}'}")
    print("passed" if verdict.passed else "FAILED")
