"""What ``transformers.Trainer`` must do otherwise under a sequence group, as a class to put before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longctx.comm.rank_numbers import gather_numbers
from longctx.errors import ConfigError, DataError
from longctx.integrations.transformers.packing import packed_rows
from longctx.integrations.transformers.reduction import device_of, summed
from longctx.integrations.transformers.sharing import SharedSequence
from longctx.sequence import IGNORE

INPUTS = ("input_ids", "labels", "position_ids", "attention_mask", "documents")


class SequenceTrainer:
    """Trains with whole batches that the ranks of a sequence group share: ``class Mine(SequenceTrainer, Trainer)``.

    ``sequence``: what ``register`` returned. ``length``: as in ``SharedSequence.adopt``. Accelerate wraps the model in
    DDP or FSDP over all processes, which average gradients; the loss is made for that. A batch of
    ``per_device_train_batch_size`` rows is that of a sequence group.
    """

    def __init__(self, *args: Any, sequence: SharedSequence, length: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.sequence = sequence
        _require_trainer(trainer)
        sequence.adopt(trainer.model, length)
        # Our loss is divided by the labels of all microbatches of a step already; the second name is that of 4.57.
        trainer.loss_is_scaled_for_ga = True
        trainer.model_accepts_loss_kwargs = True
        self._leader, self._leaders = _leaders(sequence)

    def get_train_dataloader(self) -> Any:
        """Returns the loader of whole batches, the same on all ranks of a sequence group."""
        return self._of_group(super().get_train_dataloader())  # type: ignore[misc]

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the loader of whole batches for an evaluation of the loss."""
        return self._of_group(super().get_eval_dataloader(*args, **kwargs))  # type: ignore[misc]

    def _of_group(self, loader: Any) -> Any:
        """Lets accelerate deal batches to sequence groups, where it deals them to processes."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return loader
        dealers = [one for one in (loader.batch_sampler, loader.dataset) if hasattr(one, "process_index")]
        if not dealers:
            raise ConfigError(
                f"{type(loader).__name__} deals batches in a way that sequence groups cannot share; "
                "leave accelerator_config's dispatch_batches off"
            )
        for dealer in dealers:
            dealer.num_processes, dealer.process_index = len(self._leaders), self._leaders.index(self._leader)
            # With nobody to be even with, a last batch is as short as on one process: no row comes twice.
            dealer.even_batches = len(self._leaders) > 1
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        """Returns the microbatches of a step, and how many labels they have on all ranks."""
        batches, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        own, refused = 0, None
        try:
            own = sum(int((packed_rows(**_inputs(batch)).labels != IGNORE).sum()) for batch in batches)
        except Exception as error:
            refused = error
        trainer: Any = self
        numbers = torch.tensor([own, int(refused is not None)], device=trainer.args.device)
        if dist.is_initialized():
            numbers = summed(numbers, dist.group.WORLD)
        if refused is not None:
            raise refused
        if numbers[1]:
            raise DataError("another rank refuses its batch, and says why")
        # Every rank of a group counts the same batch.
        return batches, numbers[0] // self.sequence.size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cuts the batch, runs the model on this rank's part, and returns the loss of all ranks."""
        if not model.training:
            num_items_in_batch = (
                None  # an evaluation counts a batch once for each rank that shares it; we count it once
            )
        cut = self.sequence.shard(**_inputs(inputs))
        outputs = model(**cut.inputs)
        world = dist.group.WORLD if dist.is_initialized() else None
        loss = self.sequence.loss(outputs.logits, cut, world, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates with each batch counted once, where ``transformers`` counts it for every rank."""
        trainer: Any = self
        trainer.gather_function = self._gathered  # transformers sets its own again behind each evaluation
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _gathered(self, losses: Tensor) -> Tensor:
        """Gathers one rank's losses of each group, as many at the end as there are rows."""
        trainer: Any = self
        found: Tensor = trainer.accelerator.gather(losses)
        if found.numel() > losses.numel():
            found = found.view(-1, losses.numel())[self._leaders].flatten()
        state = trainer.accelerator.gradient_state
        return found[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else found

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kw: Any) -> Any:
        """Evaluates the loss; logits are of this rank's tokens alone, and are not collected."""
        if not prediction_loss_only:
            raise ConfigError("logits are cut over ranks and not collected; set prediction_loss_only=True, or evaluate "
                              "without compute_metrics")  # fmt: skip
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kw)  # type: ignore[misc]


def _inputs(batch: Any) -> dict[str, Any]:
    """The parts of a batch that a sequence is cut of."""
    unknown = sorted(set(batch) - set(INPUTS))
    if unknown:
        raise ConfigError(f"a batch holds {', '.join(unknown)}, which is not cut; keep to {', '.join(INPUTS)}")
    return {name: batch.get(name) for name in INPUTS}


def _require_trainer(trainer: Any) -> None:
    """Refuses what a trainer would do beside our loss."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    other = config is not None and any(getattr(config, f"{axis}_enabled", False) for axis in ("tp", "cp", "sp"))
    refused = {
        "label_smoothing_factor": trainer.label_smoother is not None,
        "compute_loss_func": trainer.compute_loss_func is not None,
        "deepspeed": trainer.is_deepspeed_enabled,
        "several devices in one process (nn.DataParallel)": trainer.args.n_gpu > 1,
        "parallelism_config with tp, cp or sp": other,
    }
    for name, given in refused.items():
        if given:
            raise ConfigError(
                f"{name} is not used with a sequence group, whose loss and ranks are longctx's; leave it out"
            )


def _leaders(sequence: SharedSequence) -> tuple[int, list[int]]:
    """The first rank of this rank's sequence group, and those of all groups."""
    if not dist.is_initialized():
        return 0, [0]
    group, world = sequence.process_group, dist.group.WORLD
    assert world is not None, "processes are joined"
    own = min(dist.get_process_group_ranks(group)) if group is not None else dist.get_rank()
    leaders = sorted({int(leader) for (leader,) in gather_numbers([own], world, device_of(world))})
    if len(leaders) * sequence.size != world.size():
        raise ConfigError(
            f"{world.size()} processes are not made of whole sequence groups of {sequence.size}; every process must be "
            "in one"
        )
    return own, leaders
