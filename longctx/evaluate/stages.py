"""Runs a model that lies on a pipeline as generation does: tokens in on every rank, logits out on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.config import ModelConfig
from longctx.mesh import Mesh
from longctx.model import Decoder
from longctx.parallel.pipeline import Pipeline, through_stages


class StagedModel:
    """Passes tokens through the stages of a pipeline, one after another; ``dtype``: of hidden states."""

    def __init__(self, pipeline: Pipeline, mesh: Mesh, dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self._mesh = mesh
        self._dtype = dtype
        self.decoders: list[Decoder] = pipeline.stages
        self.config: ModelConfig = pipeline.stages[0].config

    def __call__(self, tokens: Tensor, positions: Tensor, plan: Tensor, rows: int | None = None) -> Tensor:
        """Returns logits ``[B, rows, V]``; ``rows``: how many the last stage gives, None for all."""
        logits = through_stages(self._pipeline, (tokens, positions, plan), self._mesh, self._dtype)
        if logits is None:
            shape = (len(tokens), rows or tokens.shape[1], self.config.vocab_size)
            logits = torch.empty(shape, dtype=self._dtype, device=tokens.device)
        logits = logits.contiguous()
        dist.broadcast(logits, group=self._mesh.pipeline_group, group_src=self._pipeline.owners[-1])
        return logits
