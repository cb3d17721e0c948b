"""The sections of a configuration, each with the rules that look at it alone.

A field means what the user set. Every rule names the value, itself and a valid choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from longctx.config import choices
from longctx.config.pipeline import virtual_stages
from longctx.config.rules import above, as_word, at_least, divisors, nearest_multiples, nearest_of, one_of, within
from longctx.errors import ConfigError, NotAvailableError


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder."""

    name: str = "tiny"
    vocab_size: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden_dim: int = 384  # width of SwiGLU
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.06  # falls with the width: 0.02 suits 2,048 and more
    pattern: str = "S"  # kinds of layers, repeated: S softmax attention, L linear attention
    mixer: str | None = None  # what linear layers compute
    mixer_block: int | None = None  # tokens of a block of moba, of a chunk of rat; null: the paper's
    mixer_top_k: int | None = None  # blocks that a query of moba reads, its own among them; null: the paper's

    @property
    def kinds(self) -> str:
        """The kind of each layer, one letter a layer."""
        return (self.pattern * self.layers)[: self.layers]

    def check(self) -> None:
        """Refuse sizes that no decoder can have."""
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "hidden_dim"):
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("rope_theta", "norm_eps", "init_std"):
            above(f"model.{name}", getattr(self, name), 0.0)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}; "
                f"nearest valid kv_heads: {nearest_of(self.kv_heads, divisors(self.heads))}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim={self.head_dim} must be even, for RoPE turns pairs of channels; "
                f"nearest valid head_dim: {nearest_multiples(self.head_dim, 2)}"
            )
        self._check_kinds()

    def _check_kinds(self) -> None:
        if set(self.pattern) - set(choices.LAYER_KINDS):
            near = "".join(letter for letter in self.pattern.upper() if letter in choices.LAYER_KINDS)
            raise ConfigError(
                f"model.pattern={self.pattern} must be made of S (softmax attention) and L (linear "
                f"attention); nearest valid: {near or 'S'}"
            )
        if len(self.pattern) > self.layers:
            raise ConfigError(
                f"model.pattern={self.pattern} is longer than model.layers={self.layers}; nearest valid: "
                f"model.layers={len(self.pattern)}, or model.pattern={self.kinds}"
            )
        if self.mixer is not None:
            one_of("model.mixer", self.mixer, choices.MIXERS)
        for name in ("mixer_block", "mixer_top_k"):
            value = getattr(self, name)
            if value is not None and self.mixer not in choices.SIZED_MIXERS[name]:
                raise ConfigError(
                    f"model.{name}={value} is read by model.mixer={' or '.join(choices.SIZED_MIXERS[name])}, got "
                    f"model.mixer={as_word(self.mixer)}; nearest valid: model.{name}=null"
                )
            at_least(f"model.{name}", value, 1)
        if (self.mixer is not None) != ("L" in self.pattern):
            told, near = (
                ("has linear layers, which need one", choices.MIXERS[0])
                if self.mixer is None
                else ("has no linear layer that reads it", "null")
            )
            raise ConfigError(
                f"model.mixer={as_word(self.mixer)}: model.pattern={self.pattern} {told}; nearest valid: {near}"
            )


@dataclass(frozen=True)
class AttentionConfig:
    """Who computes attention over the sharded sequence, and how the sequence is cut."""

    strategy: str = "ring"
    layout: str | None = None  # None: what the strategy prefers
    layout_block: int = 1  # tokens per stripe of the striped layout
    window: int | None = None  # a query sees itself and the window - 1 tokens before it
    kernel: str = "auto"
    document_mask: bool = True  # tokens see only their own document
    inner: int | None = None  # neighbours in one row of sp seen as a grid, for usp and burst; None: up to them
    backward: str = "auto"  # what travels in burst's backward pass: keys, queries, or auto: the smaller
    travel: str = "wide"  # gradients are summed on their way in fp32; narrow: straight home in train.dtype
    ping_pong: bool = False  # two halves of a micro-batch take turns: one exchanges while the other computes
    servers: str = "sequence"  # of tasks: ranks of one sp group, or (pipeline) of all stages
    linear: str | None = None  # who moves the states of linear layers; null: strategy, if it is one of theirs, or lasp2
    chunk: int = 64  # tokens that linear layers compute at once

    def check(self) -> None:
        """Refuse names that stand for nothing and windows that see nothing."""
        one_of("attention.strategy", self.strategy, (*choices.STRATEGIES, *choices.LINEAR_STRATEGIES))
        if self.layout is not None:
            one_of("attention.layout", self.layout, choices.LAYOUTS)
        one_of("attention.kernel", self.kernel, choices.KERNELS)
        at_least("attention.layout_block", self.layout_block, 1)
        at_least("attention.window", self.window, 1)
        at_least("attention.inner", self.inner, 1, "null")  # 1 is for strategies with a grid
        one_of("attention.backward", self.backward, choices.BACKWARD_SIDES)
        one_of("attention.travel", self.travel, choices.GRADIENT_TRAVEL)
        one_of("attention.servers", self.servers, choices.SERVERS)
        if self.linear is not None:
            one_of("attention.linear", self.linear, choices.LINEAR_STRATEGIES)
        at_least("attention.chunk", self.chunk, 1, AttentionConfig.chunk)  # others are for linear layers alone


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the mesh; their product is the world size. -1 in dp_shard: what is left."""

    dp_replicate: int = 1
    dp_shard: int = -1
    sp: int = 1
    tp: int = 1
    pp: int = 1
    pp_schedule: str = "1f1b"  # gpipe, 1f1b, interleaved_1f1b, zbv or dualpipev
    pp_virtual: int | None = None  # stages per pipeline rank; None: what the schedule needs

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline; 1 without one."""
        return 1 if self.pp == 1 else self.pp * virtual_stages(self.pp_schedule, self.pp_virtual)

    def check(self) -> None:
        """Refuse degrees that are no degrees, and stages that the schedule does not have."""
        for name in ("dp_replicate", "sp", "tp", "pp"):
            at_least(f"parallel.{name}", getattr(self, name), 1)
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ConfigError(f"parallel.dp_shard={self.dp_shard} must be at least 1, or -1 for what the others leave")
        virtual_stages(self.pp_schedule, self.pp_virtual)


# Process groups count whole milliseconds, and add them to a clock that counts nanoseconds in 64 bits.
TIMEOUT_SECONDS = (0.001, 1e9)


@dataclass(frozen=True)
class CommConfig:
    """What carries messages between ranks."""

    backend: str = "gloo"  # nccl, gloo or sim
    timeout_seconds: float = 120.0
    shuffle_seed: int | None = None  # sim only: order in which ranks take turns

    def check(self) -> None:
        """Refuse unknown backends and a hand-over order where nothing is handed over."""
        one_of("comm.backend", self.backend, choices.BACKENDS)
        within("comm.timeout_seconds", self.timeout_seconds, *TIMEOUT_SECONDS)
        if self.shuffle_seed is not None and self.backend != "sim":
            raise ConfigError(
                f"comm.shuffle_seed={self.shuffle_seed} needs comm=sim, got comm={self.backend}: "
                "only simulated ranks take turns"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from and how long the packed sequences are."""

    source: str = "python_stdlib"  # python_stdlib, text or tokens
    path: str | None = None
    seq_len: int = 1024
    text_key: str = "text"  # field of a JSONL line that holds the text
    token_dtype: str = "uint16"  # of a token file: uint16 or uint32
    max_documents: int | None = None  # take only the first so many documents
    balance: str = "none"  # even attention work: rows deals a step's rows by it, documents also packs by it

    def check(self) -> None:
        """Refuse sources without what they read, and options that the source would not read."""
        one_of("data.source", self.source, choices.SOURCES)
        one_of("data.token_dtype", self.token_dtype, choices.TOKEN_DTYPES)
        at_least("data.seq_len", self.seq_len, 1)
        at_least("data.max_documents", self.max_documents, 1)
        one_of("data.balance", self.balance, choices.BALANCES)
        if self.path is None and self.source != "python_stdlib":
            raise ConfigError(f"data.path=null: data={self.source} reads a file or folder, set data.path")
        if self.path is not None and self.source == "python_stdlib":
            raise ConfigError(f"data.path={self.path} is not read by data=python_stdlib; set data=text or data=tokens")
        for name, reader in (("text_key", "text"), ("token_dtype", "tokens")):
            value, default = getattr(self, name), getattr(DataConfig, name)
            if value != default and self.source != reader:
                raise ConfigError(
                    f"data.{name}={value} is not read by data={self.source}; set data={reader}, or leave {default}"
                )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and a learning rate that warms up linearly and falls along a cosine."""

    name: str = "adamw"
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0

    def check(self) -> None:
        """Refuse numbers with which the optimizer cannot step."""
        one_of("optim.name", self.name, choices.OPTIMIZERS)
        above("optim.lr", self.lr, 0.0)
        within("optim.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)
        at_least("optim.warmup_steps", self.warmup_steps, 0)
        within("optim.beta1", self.beta1, 0.0, 1.0, open_end=True)
        within("optim.beta2", self.beta2, 0.0, 1.0, open_end=True)
        above("optim.eps", self.eps, 0.0)
        at_least("optim.weight_decay", self.weight_decay, 0.0)
        above("optim.grad_clip", self.grad_clip, 0.0)


@dataclass(frozen=True)
class TrainConfig:
    """The step: how many, in which arithmetic, over which batch."""

    steps: int = 100
    seed: int = 0
    dtype: str = "float32"  # float32, bfloat16 (fp32 master weights and reductions) or float64
    global_batch: int = 4  # sequences per optimizer step, the same data for every mesh
    micro_batch: int = 1  # sequences per forward pass of one data-parallel group
    recompute: str = "none"  # none, selective (keeps attention, products, collectives) or full (keeps attention)
    recompute_keep: tuple[str, ...] | None = (
        None  # what full keeps instead; []: nothing, attention is run again; attention_tail: half of it
    )
    mlp_chunk: int | None = None  # tokens whose MLP intermediates exist at one time; null: all
    loss_chunk: int = 1024  # tokens whose logits exist at one time
    offload: bool = False  # what recompute keeps waits for the backward pass in host memory
    compile: bool = False
    deterministic: bool = False
    canary: bool = True  # compare one tiny step with the dense single-device step before training

    def check(self) -> None:
        """Refuse counts below one and names that stand for nothing."""
        one_of("train.dtype", self.dtype, choices.DTYPES)
        one_of("train.recompute", self.recompute, choices.RECOMPUTE)
        at_least("train.seed", self.seed, 0)
        for name in ("steps", "global_batch", "micro_batch", "loss_chunk", "mlp_chunk"):
            at_least(f"train.{name}", getattr(self, name), 1)
        self._check_memory_levers()

    def _check_memory_levers(self) -> None:
        for name in self.recompute_keep or ():
            one_of("train.recompute_keep", name, choices.KEEPABLE)
        if self.recompute_keep is not None and self.recompute != "full":
            raise ConfigError(
                f"train.recompute_keep=[{','.join(self.recompute_keep)}] says what train.recompute=full keeps, got "
                f"train.recompute={self.recompute}; set train.recompute=full, or train.recompute_keep=null"
            )
        if {"attention", "attention_tail"} <= set(self.recompute_keep or ()):
            raise ConfigError(
                "train.recompute_keep names attention, which keeps all of its outputs, and attention_tail, which keeps "
                "half of them; leave one out"
            )
        if self.offload and self.recompute == "none":
            raise ConfigError(
                "train.offload=true moves what recompute keeps, and train.recompute=none recomputes nothing; "
                "nearest valid: train.recompute=selective"
            )
        tail = "[attention_tail]" if "attention_tail" in (self.recompute_keep or ()) else None
        levers = (("mlp_chunk", self.mlp_chunk), ("offload", self.offload or None), ("recompute_keep", tail))
        for name, value in levers:
            if self.compile and value is not None:
                raise ConfigError(
                    f"train.{name}={str(value).lower()} does not go into the one graph of a block that "
                    f"train.compile=true makes; set train.compile=false, or leave train.{name} out"
                )


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is written and how much of it is kept."""

    every: int = 0  # steps between checkpoints; 0: only at the end
    at_end: bool = True
    keep: int = 3  # newest committed checkpoints to keep; 0: all

    def check(self) -> None:
        """Refuse negative counts."""
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 0)


@dataclass(frozen=True)
class EngineConfig:
    """Who owns the step."""

    name: str = "native"  # native, deepspeed or megatron

    def check(self) -> None:
        """Refuse engines that are unknown or not built."""
        one_of("engine", self.name, choices.ENGINES, choices.ENGINES_PLANNED)


_SLURM_TIME = re.compile(r"(\d+-)?\d{1,3}:[0-5]\d:[0-5]\d")


@dataclass(frozen=True)
class ClusterConfig:
    """Where the run happens: what launch and submit need to know of the machines."""

    name: str = "local"
    nodes: int = 1
    devices_per_node: int | None = None  # null: as many as the launcher started; of simulated ranks, all
    nics: int = 1  # of a node; above 1, served attention is routed over them as docs/planner.md says
    nic_bandwidth: float = 50e9  # bytes/s of one of them
    link_bandwidth: float = 450e9  # bytes/s from one device of a node to the others
    partition: str | None = None
    account: str | None = None
    time_limit: str = "24:00:00"

    @property
    def devices(self) -> int:
        """Ranks that ``submit`` asks for on each node."""
        return self.devices_per_node or 1

    def check(self) -> None:
        """Refuse an empty cluster and a time limit that Slurm would not read."""
        at_least("cluster.nodes", self.nodes, 1)
        at_least("cluster.devices_per_node", self.devices_per_node, 1)
        at_least("cluster.nics", self.nics, 1)
        for name in ("nic_bandwidth", "link_bandwidth"):
            value, default = getattr(self, name), getattr(ClusterConfig, name)
            above(f"cluster.{name}", value, 0.0)
            if value != default and self.nics == 1:
                raise ConfigError(
                    f"cluster.{name}={value} says when messages are routed over several NICs, and cluster.nics=1; "
                    f"set cluster.nics=8, or leave cluster.{name} at {default}"
                )
        if not _SLURM_TIME.fullmatch(self.time_limit):
            raise ConfigError(
                f"cluster.time_limit={self.time_limit} must read [days-]hours:minutes:seconds, "
                "for example 24:00:00 or 2-12:00:00"
            )


@dataclass(frozen=True)
class LoggerConfig:
    """What a run tells, and to whom."""

    progress: bool = True
    wandb: str = "offline"  # offline, online or disabled
    project: str = "longctx"
    report: bool = True
    memory: bool | None = None  # bytes by category of one step, in memory.json; null: unless train.compile
    trace: bool = False

    def check(self) -> None:
        """Refuse unknown wandb modes, and the trace, which has no code yet."""
        one_of("logger.wandb", self.wandb, choices.WANDB_MODES)
        if self.trace:
            raise NotAvailableError("logger.trace=true: the trace of a run is not built yet; available: false")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it is called."""

    dir: str | None = None  # None: runs/<date>-<time>, chosen once for all ranks
    name: str | None = None
