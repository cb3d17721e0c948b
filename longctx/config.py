"""The configuration of a run: one frozen tree that ``conf/`` mirrors field by field.

A field means what the user set. Rules that look at one field stand in that field's class; rules that look
across fields stand in ``Config.check`` and friends. Every rule names the value, itself and a valid choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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
    init_std: float = 0.02


@dataclass(frozen=True)
class AttentionConfig:
    """Who computes attention over the sharded sequence, and how the sequence is cut."""

    strategy: str = "ring"
    layout: str | None = None  # None: what the strategy prefers
    layout_block: int = 1  # tokens per stripe of the striped layout
    window: int | None = None  # a query sees itself and the window - 1 tokens before it
    kernel: str = "auto"
    document_mask: bool = True  # tokens see only their own document


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the mesh; their product is the world size. -1 in dp_shard: what is left."""

    dp_replicate: int = 1
    dp_shard: int = -1
    sp: int = 1
    tp: int = 1
    pp: int = 1


@dataclass(frozen=True)
class CommConfig:
    backend: str = "gloo"  # nccl, gloo or sim
    timeout_seconds: float = 120.0
    shuffle_seed: int | None = None  # sim only: order in which ranks take turns


@dataclass(frozen=True)
class DataConfig:
    source: str = "python_stdlib"  # python_stdlib, text or tokens
    path: str | None = None
    seq_len: int = 1024
    text_key: str = "text"  # field of a JSONL line that holds the text
    token_dtype: str = "uint16"  # of a token file: uint16 or uint32
    max_documents: int | None = None  # take only the first so many documents


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    seed: int = 0
    dtype: str = "float32"  # float32, bfloat16 (fp32 master weights and reductions) or float64
    global_batch: int = 4  # sequences per optimizer step, the same data for every mesh
    micro_batch: int = 1  # sequences per forward pass of one data-parallel group
    recompute: str = "none"  # none, selective or full; attention is never run twice
    loss_chunk: int = 1024  # tokens whose logits exist at one time
    compile: bool = False
    deterministic: bool = False
    canary: bool = True  # compare one tiny step with the dense single-device step before training


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # steps between checkpoints; 0: only at the end
    at_end: bool = True
    keep: int = 3  # newest committed checkpoints to keep; 0: all


@dataclass(frozen=True)
class EngineConfig:
    name: str = "native"  # native, deepspeed or megatron


@dataclass(frozen=True)
class ClusterConfig:
    """Where the run happens: what launch and submit need to know of the machines."""

    name: str = "local"
    nodes: int = 1
    devices_per_node: int = 1
    partition: str | None = None
    account: str | None = None
    time_limit: str = "24:00:00"


@dataclass(frozen=True)
class LoggerConfig:
    progress: bool = True
    wandb: str = "offline"  # offline, online or disabled
    project: str = "longctx"
    report: bool = True
    trace: bool = False


@dataclass(frozen=True)
class RunConfig:
    dir: str | None = None  # None: runs/<date>-<time>, chosen once for all ranks
    name: str | None = None


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run: RunConfig = field(default_factory=RunConfig)
