"""Gloo processes, or the only one: a loop of one's own and a ``Trainer`` of twenty steps.

Arguments: world and the folder where results and the meeting are. Ranks are forked, for imports are most of the time.
"""

import copy
import json
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from longctx.integrations.transformers import SequenceTrainer, register
from tests.huggingface.small_models import published

LENGTHS = ((11, 30), (41,), (5, 36), (20, 1, 20))
STEPS = 20


class Rows(torch.utils.data.Dataset):
    """Packed rows with no document's first token as a target, which transformers' own loss would count."""

    def __len__(self):
        return 25

    def __getitem__(self, number):
        tokens = torch.randint(0, 96, (41,), generator=torch.Generator().manual_seed(number)) % (7 + number % 5)
        positions = torch.cat([torch.arange(length) for length in LENGTHS[number % len(LENGTHS)]])
        return {"input_ids": tokens, "position_ids": positions, "labels": tokens.masked_fill(positions == 0, -100)}


class Mine(SequenceTrainer, transformers.Trainer):
    """The trainer of the page."""


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def arguments(folder):
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=3e-3, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, seed=3, data_seed=3,
        disable_tqdm=True, eval_strategy="steps", eval_steps=10, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip


def trained(kind, folder, model, **own):
    few = torch.utils.data.Subset(Rows(), range(11))
    data = {"train_dataset": Rows(), "eval_dataset": few, "data_collator": collate}
    trainer = kind(model=model, args=arguments(folder), **data, **own)
    trainer.train()
    history = trainer.state.log_history
    return {
        "losses": [one["loss"] for one in history if "loss" in one],
        "norms": [float(one["grad_norm"]) for one in history if "grad_norm" in one],
        "evaluated": [one["eval_loss"] for one in history if "eval_loss" in one],
        "weights": float(sum(p.detach().double().abs().sum() for p in trainer.model.parameters())),
    }


def loop(group):
    """Five steps of a loop as the page has it, with sum_gradients."""
    sequence = register(group, "ring", "striped")
    model = copy.deepcopy(published("olmo3")).train()
    sequence.adopt(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for number in range(5):
        batch = collate([Rows()[number]])
        cut = sequence.shard(**batch)
        loss = sequence.loss(model(**cut.inputs).logits, cut)
        loss.backward()
        sequence.sum_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main(rank, world, folder):
    transformers.utils.logging.disable_progress_bar()
    group = None
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        group = dist.group.WORLD
    found = {"loop": loop(group)}
    if world == 1:
        model = copy.deepcopy(published("gemma3"))
        found["theirs"] = trained(transformers.Trainer, folder, model)
    sequence = register(group, "ring", "zigzag")
    found["ours"] = trained(Mine, folder, copy.deepcopy(published("gemma3")), sequence=sequence)
    (Path(folder) / f"{world}-{rank}.json").write_text(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    context, world = multiprocessing.get_context("fork"), int(sys.argv[1])
    ranks = [context.Process(target=main, args=(rank, world, sys.argv[2]), daemon=True) for rank in range(world)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    sys.exit(max(abs(one.exitcode) for one in ranks))
