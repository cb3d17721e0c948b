"""Lists what a run can hardly mean, one small function each: value, rule, nearest choice. The last lines list all.

``refuse`` is for what cannot be meant, ``warn`` for what only somebody who tries things out means. What has no
meaning at all stands in ``longctx.config``, and is refused before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from longctx.attention.runtime.local_kernel import KernelProblem, load_kernel
from longctx.catalog import KERNELS, SCHEDULES, SOURCES
from longctx.config import Config
from longctx.launcher.preflight.facts import Facts, Finding
from longctx.launcher.preflight.memory import GIB, memory_floor
from longctx.parallel.data import compute_dtype
from longctx.train.learning_rate import terms_of

EPOCHS = 4  # repeats up to which data are worth nearly as much as new ones (Muennighoff et al., 2023)
SHORTEST_SHARE = 1024  # tokens of a rank below which a GPU waits for messages
MOST_IDLE = 0.5  # of a pipeline's time
DENSE_SCORES = 1 << 22  # of one head, that the dense kernel holds at a time
DENSE_TENSORS = 4  # of such scores, in its backward pass


def refuse(words: str) -> Finding:
    return Finding(words, refused=True)


def warn(words: str) -> Finding:
    return Finding(words, refused=False)


def warm_up(facts: Facts) -> Finding | None:
    """A schedule that is over before its warm-up is, or a run."""
    steps = facts.config.train.steps
    optim = facts.config.optim.settled(steps)
    terms = terms_of(optim, steps)
    begin, end = SCHEDULES.load(optim.schedule).falls(terms) or (steps, steps)
    tenth = replace(optim, warmup_steps=None).settled(steps).warmup_steps
    if terms.warmup and (terms.warmup > begin or terms.warmup >= end):
        words = (
            f"optim.warmup_steps={terms.warmup} leaves no step at the full rate before optim.schedule={optim.schedule} "
            f"has ended at step {end}; nearest: optim.warmup_steps=null, which is {tenth}"
        )
        return warn(words) if facts.resuming else refuse(words)
    if terms.warmup >= steps > 1:
        return warn(
            f"train.steps={steps} ends within optim.warmup_steps={terms.warmup}; nearest: "
            f"train.steps={10 * terms.warmup}"
        )
    return None


def decay_without_floor(facts: Facts) -> Finding | None:
    """A decay that leads nowhere."""
    optim = facts.config.optim
    if optim.schedule == "constant" or optim.min_lr_ratio < 1.0:
        return None
    return warn(
        f"optim.min_lr_ratio=1.0: optim.schedule={optim.schedule} never falls; nearest: optim.schedule=constant"
    )


def usual_rate(parameters: int) -> float:
    """Returns the rate that suits a size with AdamW, by the rule of OLMo's ladder: 0.0047 (N / 108M)^(-1/3) / 2."""
    return 0.0047 * (parameters / 108e6) ** (-1 / 3) / 2


def rate_of_size(facts: Facts) -> Finding | None:
    """A learning rate far from what models of this size are trained with."""
    optim = facts.config.optim
    if optim.name != "adamw":
        return None
    usual = usual_rate(facts.parameters)
    if usual / 1000 <= optim.lr <= 2.5 * usual:
        return None
    return warn(
        f"optim.lr={optim.lr:g}: models of {_count(facts.parameters)} parameters take {usual / 20:.1g} to {usual:.1g} "
        f"with {optim.name}; nearest: optim.lr={usual:.1g}"
    )


def unused_vocabulary(facts: Facts) -> Finding | None:
    """A vocabulary of which the data can use a small part."""
    model, source = facts.config.model, facts.config.data.source
    ids = getattr(SOURCES.load(source), "ids", 0)
    if facts.config.data.tokenizer is not None or not ids or model.vocab_size < 8 * ids:
        return None
    tables = 1 if model.tie_embeddings else 2
    idle = (model.vocab_size - ids) * model.dim * tables
    return warn(
        f"model.vocab_size={model.vocab_size}: data={source} has {ids} ids, bytes; {_count(idle)} parameters of "
        f"embedding and head learn nothing; nearest: data.tokenizer=DIR, or model.vocab_size={ids}"
    )


def short_data(facts: Facts) -> Finding | None:
    """Data that are seen again and again."""
    config, corpus = facts.config, facts.corpus
    if corpus is None or corpus.parts:  # a mixture repeats its sources as its weights say, and bounds them itself
        return None
    per_step = config.train.global_batch * config.data.seq_len
    epochs = config.train.steps * per_step / corpus.total_tokens
    if corpus.total_tokens < per_step:
        return warn(
            f"train.global_batch={config.train.global_batch} × data.seq_len={config.data.seq_len} is "
            f"{per_step:,} tokens "
            f"a step, and the data have {corpus.total_tokens:,}: every step sees them "
            f"{per_step / corpus.total_tokens:.1f} "
            "times; nearest: a smaller batch, or more data"
        )
    if epochs <= EPOCHS:
        return None
    fewer = max(1, EPOCHS * corpus.total_tokens // per_step)
    return warn(
        f"train.steps={config.train.steps} goes {epochs:.1f} times over the {corpus.total_tokens:,} tokens of "
        "the data; "
        f"above {EPOCHS} times they teach little; nearest: train.steps={fewer}"
    )


def short_documents(facts: Facts) -> Finding | None:
    """Sequences that no document fills, where documents are masked from one another."""
    config, corpus = facts.config, facts.corpus
    if corpus is None or not config.attention.document_mask or not config.model.has_softmax:
        return None
    longest = int(corpus.lengths.max())
    if longest * 2 >= config.data.seq_len:
        return None
    return warn(
        f"data.seq_len={config.data.seq_len}: the longest document has {longest:,} tokens, and with "
        "attention.document_mask=true no token sees farther; nearest: longer documents, or "
        f"data.seq_len={1 << max(0, longest - 1).bit_length()}"
    )


def wide_window(facts: Facts) -> Finding | None:
    """A window that hides nothing."""
    window, length = facts.config.attention.window, facts.config.data.seq_len
    if window is None or window < length:
        return None
    return warn(
        f"attention.window={window} hides nothing of data.seq_len={length}; nearest: attention.window=null, or below it"
    )


def rope_base(facts: Facts) -> Finding | None:
    """Rotary positions whose base is small for the length (Men et al., 2024: at least 0.0424 L^1.628)."""
    model, length = facts.config.model, facts.config.data.seq_len
    least = 0.0424 * length**1.628
    if not model.has_softmax or model.rope.type != "default" or model.rope_theta >= least / 4:
        return None
    return warn(
        f"model.rope_theta={model.rope_theta:g}: {length:,} tokens take about {least:.0e} (Men et al., 2024), or far "
        f"ones are told apart badly; nearest: model.rope_theta={least:.0e}"
    )


def late_checkpoints(facts: Facts) -> Finding | None:
    """Saves that come after the end."""
    every, steps = facts.config.checkpoint.every, facts.config.train.steps
    if every <= steps or not every:
        return None
    end = "only the end is saved" if facts.config.checkpoint.at_end else "no step is saved"
    return warn(
        f"checkpoint.every={every} is beyond train.steps={steps}: {end}; nearest: checkpoint.every={max(1, steps // 2)}"
    )


def dense_kernel(facts: Facts) -> Finding | None:
    """The reference kernel on a GPU, which takes what the fast ones refuse."""
    config = facts.config
    if not facts.on_cuda or config.attention.kernel != "auto" or not config.model.has_softmax:
        return None
    if config.train.dtype == "float64":
        return None  # for which there is no other kernel; ``slow_arithmetic`` says so
    heads, kv_heads = config.local_heads
    problem = KernelProblem("cuda", compute_dtype(config.train.dtype), heads, kv_heads, config.model.head_dim)
    try:
        reasons = [load_kernel(name).refuses(problem) for name in KERNELS]
    except (RuntimeError, AssertionError):
        return None  # only its device is still in question, and there is none where a job is submitted
    if None in reasons[:-1]:
        return None
    scores = min(DENSE_SCORES, facts.tokens_per_rank**2) * heads * 4 * DENSE_TENSORS / GIB
    nearest = (
        "train.dtype=bfloat16" if config.train.dtype != "bfloat16" else "model.head_dim of a multiple of 8 up to 256"
    )
    return warn(
        f"train.dtype={config.train.dtype} with model.head_dim={config.model.head_dim} falls to the dense "
        f"kernel ({reasons[0]}): "
        f"it holds {scores:.1f} GiB of scores at a time and is many times slower; nearest: {nearest}"
    )


def odd_sizes(facts: Facts) -> Finding | None:
    """Matrix sizes that tensor cores do not take."""
    model, tp = facts.config.model, facts.config.parallel.tp
    if not facts.on_cuda or facts.config.train.dtype != "bfloat16":
        return None
    for name in ("vocab_size", "dim", "hidden_dim"):
        size = getattr(model, name)
        if (size // tp if name != "dim" else size) % 8:
            unit = 64 * tp
            return warn(
                f"model.{name}={size}: tensor cores take multiples of 8 on each rank, and products are far "
                "slower without "
                f"them; nearest: model.{name}={-(-size // unit) * unit}"
            )
    return None


def slow_arithmetic(facts: Facts) -> Finding | None:
    """Arithmetic that the machine has no units for."""
    dtype, backend = facts.config.train.dtype, facts.config.comm.backend
    if dtype == "bfloat16" and not facts.on_cuda:
        return warn(
            f"train.dtype=bfloat16 on comm={backend}: most CPUs have no 16-bit units and compute it many times slower; "
            "nearest: train.dtype=float32"
        )
    if dtype == "float64" and facts.on_cuda:
        return warn(
            "train.dtype=float64 on comm=nccl is for checks and many times slower; nearest: train.dtype=bfloat16"
        )
    return None


def small_shares(facts: Facts) -> Finding | None:
    """More ranks for a sequence than it has work for."""
    sp, length = facts.config.parallel.sp, facts.config.data.seq_len
    if sp == 1 or facts.tokens_per_rank >= (SHORTEST_SHARE if facts.on_cuda else 1):
        return None
    fewer = max(1, 1 << max(0, (length // SHORTEST_SHARE).bit_length() - 1)) if facts.on_cuda else length
    return warn(
        f"parallel.sp={sp} leaves {facts.tokens_per_rank} tokens of data.seq_len={length} to a rank: messages "
        "take longer "
        f"than the work; nearest: parallel.sp={fewer}, and parallel.dp_shard for the others"
    )


def wide_tensor_axis(facts: Facts) -> Finding | None:
    """Tensor parallelism across nodes."""
    tp, devices = facts.config.parallel.tp, facts.config.cluster.devices_per_node
    if devices is None or tp <= devices:
        return None
    return warn(
        f"parallel.tp={tp} goes beyond a node of cluster.devices_per_node={devices}: every layer waits for the "
        "slow links; "
        f"nearest: parallel.tp={devices}, and parallel.sp for the others"
    )


def idle_pipeline(facts: Facts) -> Finding | None:
    """A pipeline that is mostly empty."""
    parallel, train = facts.config.parallel, facts.config.train
    count = train.global_batch // (parallel.dp_replicate * parallel.dp_shard * train.micro_batch)
    idle = (parallel.pp - 1) / (count + parallel.pp - 1)
    if idle <= MOST_IDLE:
        return None
    more = parallel.pp * train.global_batch // count
    return warn(
        f"parallel.pp={parallel.pp} with {count} microbatch{'es' if count > 1 else ''} is idle for {idle:.0%} "
        "of a step; "
        f"nearest: train.global_batch={more}"
    )


def too_large(facts: Facts) -> Finding | None:
    """A run that does not fit into the memory of its devices."""
    device, floor = facts.device, facts.floor
    if device is None or floor.total <= device.memory:
        return None
    model, length = facts.config.model, facts.config.data.seq_len
    return refuse(
        f"model={model.name} with data.seq_len={length} takes at least {_gib(floor.total)} GiB on each of "
        f"{facts.ranks} ranks "
        f"(weights and optimizer {_gib(floor.weights)}, gradients {_gib(floor.gradients)}, activations "
        f"{_gib(floor.activations)}), and a rank has {_gib(device.memory)} GiB ({device.known_by}); "
        f"nearest: {_that_fits(facts, device.memory)}"
    )


def _that_fits(facts: Facts, memory: int) -> str:
    """Names the smallest change after which the bound is below ``memory``."""
    for words, config in _smaller(facts.config):
        if memory_floor(config, facts.parameters).total <= memory:
            return words
    return "a smaller model"


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """Lists runs that take less memory, from the smallest change on; each keeps the changes before it."""
    parallel, train = config.parallel, config.train
    said: list[str] = []

    def changed(section: str, **fields: Any) -> tuple[str, Config]:
        nonlocal config
        said.extend(f"{section}.{name}={'[]' if value == () else str(value).lower()}" for name, value in fields.items())
        config = replace(config, **{section: replace(getattr(config, section), **fields)})
        return " ".join(said), config

    if parallel.dp_replicate > 1:
        yield changed("parallel", dp_replicate=1, dp_shard=parallel.dp_shard * parallel.dp_replicate)
    if train.micro_batch > 1:
        yield changed("train", micro_batch=1)
    if train.recompute != "full":
        yield changed("train", recompute="full")
    if train.recompute_keep != ():
        yield changed("train", recompute_keep=())
    levers = " ".join(said)
    for factor in (2**power for power in range(1, 12)):
        sp = config.parallel.sp * factor
        more = replace(config, parallel=replace(config.parallel, sp=sp))
        yield f"{factor} times as many ranks with parallel.sp={sp}{f' {levers}' if levers else ''}", more


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"


def _count(number: int) -> str:
    """Writes a number of parameters as people say it."""
    power = max(0, min(3, int(math.log10(max(1, number))) // 3))
    return f"{number / 1000**power:.3g}{('', 'K', 'M', 'B')[power]}"


def job_without_gpus(facts: Facts) -> Finding | None:
    """A job of a cluster that computes on its CPUs."""
    cluster = facts.config.cluster
    if cluster.name != "slurm" or facts.on_cuda:
        return None
    return warn(
        f"comm={facts.config.comm.backend} computes on CPUs, and the job asks Slurm for no GPU; nearest: comm=nccl, "
        f"which asks for {cluster.devices} on each node"
    )


RULES: tuple[Callable[[Facts], Finding | None], ...] = (
    warm_up,
    decay_without_floor,
    rate_of_size,
    unused_vocabulary,
    short_data,
    short_documents,
    wide_window,
    rope_base,
    late_checkpoints,
    dense_kernel,
    odd_sizes,
    slow_arithmetic,
    small_shares,
    wide_tensor_axis,
    idle_pipeline,
    too_large,
    job_without_gpus,
)
