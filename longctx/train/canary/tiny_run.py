"""Builds a shrunken run on its mesh, which the canary and ``longctx verify --mesh`` step and inspect."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.config import Config
from longctx.engines import engine_of
from longctx.mesh import Mesh
from longctx.model import Decoder, initialize
from longctx.parallel import parallelize
from longctx.parallel.data import full_tensor, master_dtype
from longctx.parallel.pipeline import Pipeline
from longctx.train.batch_sharder import BatchSharder
from longctx.train.canary.sample import seed_of
from longctx.train.optimizer import build_optimizer
from longctx.train.step import TrainStep


@dataclass(frozen=True)
class TinyRun:
    """A shrunken run that has the real run's own parts, as one rank holds them."""

    model: Decoder | Pipeline
    step: TrainStep
    sharder: BatchSharder
    mesh: Mesh
    shapes: dict[str, torch.Size]  # of the whole model's parameters

    @classmethod
    def of(cls, config: Config, mesh: Mesh, device: torch.device) -> TinyRun:
        """Builds a run from a shrunken configuration that is resolved for ``mesh``'s world; every rank calls it."""
        decoder = Decoder(config.model, loss_chunk=config.train.loss_chunk).to(master_dtype(config.train.dtype))
        initialize(decoder, seed_of(config))
        shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
        model = parallelize(decoder.to(device), config, mesh)
        engine = engine_of(model, build_optimizer(model, config.optim), config, mesh)
        step = TrainStep(engine, mesh, device, config.optim.grad_clip)
        return cls(model, step, BatchSharder.of(config, mesh, device), mesh, shapes)

    def gradients(self) -> dict[str, Tensor]:
        """Returns every parameter's gradient in full and in fp64, on every rank.

        All ranks call it after the step's ``gradients``.
        """
        parts = {name: p.grad for name, p in self._parameters() if p.grad is not None}
        assert len(parts) == len(list(self._parameters())), "every parameter takes part in the loss"
        return self._whole(parts.items())

    def weights(self) -> dict[str, Tensor]:
        """Returns every parameter in full and in fp64, on every rank; all ranks call it."""
        return self._whole((name, p.detach()) for name, p in self._parameters())

    def _parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Yields the parameters that this rank holds a part of."""
        return self.model.own_parameters() if isinstance(self.model, Pipeline) else self.model.named_parameters()

    def _whole(self, parts: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Returns every stage's tensors on every rank: each is one stage's, to which the others add zeros."""
        own = {name: full_tensor(part).double() for name, part in parts}
        nothing = next(iter(own.values())).new_zeros(())
        flat = torch.cat([own.get(name, nothing.expand(shape)).flatten() for name, shape in self.shapes.items()])
        dist.all_reduce(flat, group=self.mesh.pipeline_group)
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}
