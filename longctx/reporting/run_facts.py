"""Describes a run before its first step: what is trained, on which ranks, by what, on how much."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from longctx.attention.runtime.local_kernel import KernelProblem, select_kernel
from longctx.comm.rank_numbers import gather_numbers
from longctx.config import Config
from longctx.mesh import Mesh
from longctx.model import Decoder
from longctx.parallel.core import layout_of
from longctx.parallel.data import compute_dtype
from longctx.reporting.units import quantity

# The axes of the mesh from the outermost to the innermost.
AXES = ("dp_replicate", "dp_shard", "sp", "tp", "pp")


@dataclass(frozen=True)
class Work:
    """Says what a run has to do: documents and tokens that it is trained on, and steps that are done.

    ``held_out``: documents that it is not trained on. ``samples``: sequences that it has read at its end. ``command``:
    starts such a run. ``sources``: of a mixture, each with its name, share of tokens and epochs in all.
    """

    documents: int
    held_out: int
    tokens: int
    done: int
    samples: int
    command: str
    sources: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class RunFacts:
    """Holds what a run says of itself.

    ``parameters``: of the whole model, each once. ``parameters_per_rank``: the most that a rank holds.
    ``state_bytes_per_rank``: of these and their gradients; what else a step needs is not known before it is taken.
    """

    parameters: int
    parameters_per_rank: int
    state_bytes_per_rank: int
    ranks: int
    mesh: str
    attention: str
    layout: str
    kernel: str | None
    dtype: str
    backend: str
    device: str
    source: str
    documents: int
    held_out: int
    tokens: int
    epochs: float
    first_step: int
    steps: int
    tokens_per_step: int
    checkpoints: str
    command: str
    sources: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, config: Config, mesh: Mesh, device: torch.device, model: nn.Module, work: Work) -> RunFacts:
        """Describes a run that is built; every rank calls it. ``model``: what this rank trains."""
        own = [_local(p) for p in model.parameters()]
        held = [sum(p.numel() for p in own), 2 * sum(p.nbytes for p in own)]
        most, most_bytes = (int(max(row)) for row in zip(*gather_numbers(held, mesh.world_group, device), strict=True))
        degrees = [(axis, getattr(config.parallel, axis)) for axis in AXES]
        tokens_per_step = config.train.global_batch * config.data.seq_len
        return cls(
            parameters=parameters_of(config),
            parameters_per_rank=most,
            state_bytes_per_rank=most_bytes,
            ranks=torch.distributed.get_world_size(mesh.world_group),
            mesh=" x ".join(f"{axis} {degree}" for axis, degree in degrees if degree != 1),
            attention=_attention(config),
            layout=layout_of(config).name,
            kernel=_kernel(config, device),
            dtype=config.train.dtype,
            backend=config.comm.backend,
            device=device.type,
            source=config.data.source if config.data.path is None else f"{config.data.source} {config.data.path}",
            documents=work.documents,
            held_out=work.held_out,
            tokens=work.tokens,
            epochs=work.samples * config.data.seq_len / work.tokens,
            first_step=work.done + 1,
            steps=config.train.steps,
            tokens_per_step=tokens_per_step,
            checkpoints=_checkpoints(config),
            command=work.command,
            sources=work.sources,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the facts as plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Puts the facts into a few lines."""
        many = self.ranks > 1
        each = f", at most {quantity(self.parameters_per_rank)} on a rank" if many else ""
        kernel = f", kernel {self.kernel}" if self.kernel else ""
        at_least = f"{quantity(self.state_bytes_per_rank)}B{' on a rank' if many else ''}"
        held_out = f", {self.held_out:,} more are held out" if self.held_out else ""
        facts = {
            "parameters": f"{quantity(self.parameters)}{each}",
            "mesh": f"{self.ranks} ranks: {self.mesh}" if many else "one rank",
            "attention": f"{self.attention}, layout {self.layout}{kernel}",
            "arithmetic": f"{self.dtype} on {self.device} over {self.backend}",
            "memory": f"at least {at_least}, for parameters and gradients",
            "data": f"{self.source}: {self.documents:,} documents, {quantity(self.tokens)} tokens{held_out}",
            "steps": f"{self.first_step} to {self.steps} of {self.tokens_per_step:,} tokens, "
            f"{self.epochs:.3g} epochs in all",
            "checkpoints": self.checkpoints,
        }
        shares = [f"{one['name']} {one['share']:.1%}, {one['epochs']:.3g} epochs" for one in self.sources]
        if shares:
            facts["mixture"] = "; ".join(shares)
        return [f"  {name:12}{value}" for name, value in facts.items()]


def parameters_of(config: Config) -> int:
    """Counts the parameters of the configuration's decoder, tied ones once; it takes no memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config.model).parameters())


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _attention(config: Config) -> str:
    softmax, linear = config.model.has_softmax, "L" in config.model.pattern
    words = [config.attention.strategy] if softmax else []
    words += [f"{config.model.mixer} by {config.linear_strategy}"] if linear else []
    return " and ".join(words)


def _kernel(config: Config, device: torch.device) -> str | None:
    """Names the kernel of softmax layers, where there are any."""
    if not config.model.has_softmax:
        return None
    problem = KernelProblem(device.type, compute_dtype(config.train.dtype), *config.local_heads, config.model.head_dim)
    return select_kernel(config.attention.kernel, problem).name


def _checkpoints(config: Config) -> str:
    checkpoint = config.checkpoint
    when = [f"every {checkpoint.every} steps"] if checkpoint.every else []
    when += [f"every {checkpoint.every_minutes:g} minutes"] if checkpoint.every_minutes else []
    when += ["at the end"] if checkpoint.at_end else []
    if not when:
        return "none"
    return f"{', '.join(when)}; {f'the newest {checkpoint.keep} are kept' if checkpoint.keep else 'all are kept'}"
