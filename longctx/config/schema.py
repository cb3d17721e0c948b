"""The configuration of a run: one frozen tree that ``conf/`` mirrors field by field.

Rules that look at one section stand in that section's class (``sections``); rules that look across sections stand
here and, where the world size is needed, in ``resolve``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longctx.config import choices
from longctx.config.parsing import as_dict, parse
from longctx.config.pipeline import RULES
from longctx.config.rules import as_word, divisors, nearest_multiples, nearest_of
from longctx.config.sections import (
    AttentionConfig,
    CheckpointConfig,
    ClusterConfig,
    CommConfig,
    DataConfig,
    EngineConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from longctx.errors import ConfigError


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

    @property
    def local_heads(self) -> tuple[int, int]:
        """Query and key/value heads of one rank; of fewer key/value heads than ranks, each rank has one."""
        tp = self.parallel.tp
        return self.model.heads // tp, max(1, self.model.kv_heads // tp)

    @property
    def linear_strategy(self) -> str:
        """Who moves the states of linear layers; a strategy of softmax layers leaves it to LASP-2."""
        attention = self.attention
        named = attention.strategy if attention.strategy in choices.LINEAR_STRATEGIES else "lasp2"
        return attention.linear or named

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Config:
        """The configuration that a plain nested mapping states, checked; absent keys keep their defaults."""
        config = parse(cls, mapping)
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """The plain nested mapping that ``from_dict`` reads back."""
        return as_dict(self)

    def check(self) -> None:
        """Apply every rule that needs no world size."""
        for section in (
            self.model,
            self.attention,
            self.parallel,
            self.comm,
            self.data,
            self.optim,
            self.train,
            self.checkpoint,
            self.engine,
            self.cluster,
            self.logger,
        ):
            section.check()
        check_tensor_parallel(self.model, self.parallel.tp)
        if self.data.source in choices.BYTE_SOURCES and self.model.vocab_size < 256:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} must be at least 256 for the bytes of "
                f"data={self.data.source}; nearest valid value: 256"
            )
        if self.logger.memory and self.train.compile:
            raise ConfigError(
                "logger.memory=true looks at every operator, which train.compile=true leaves no trace of; "
                "set logger.memory=false or null, or train.compile=false"
            )
        if self.attention.strategy == "local" and self.parallel.sp > 1:
            raise ConfigError(
                f"attention.strategy=local keeps whole sequences on one rank and needs parallel.sp=1, "
                f"got parallel.sp={self.parallel.sp}; valid with it: {', '.join(choices.STRATEGIES[1:])}"
            )
        self._check_layers()
        self._check_balance()
        if self.attention.ping_pong:
            self._check_ping_pong()
        if self.attention.servers == "pipeline":
            self._check_servers()
        if self.cluster.nics > 1 and self.attention.strategy not in choices.SERVED_STRATEGIES:
            raise ConfigError(
                f"cluster.nics={self.cluster.nics} routes the messages of {' and '.join(choices.SERVED_STRATEGIES)}, "
                f"got attention.strategy={self.attention.strategy}; nearest valid: cluster.nics=1"
            )
        if self.parallel.pp > 1:
            self._check_pipeline()
        elif (self.parallel.pp_schedule, self.parallel.pp_virtual) != ("1f1b", None):
            raise ConfigError(
                f"parallel.pp_schedule={self.parallel.pp_schedule} with parallel.pp_virtual={self.parallel.pp_virtual} "
                "is for a pipeline, and parallel.pp=1 has none; set parallel.pp=2, or leave both out"
            )

    def _check_balance(self) -> None:
        """Rows have different attention work only where documents are masked from one another in softmax layers."""
        if self.data.balance == "none":
            return
        reason = None
        if not self.attention.document_mask:
            reason = "with attention.document_mask=false all rows have the same work"
        elif "S" not in self.model.pattern:
            reason = f"model.pattern={self.model.pattern} has no softmax layer, whose work depends on the documents"
        if reason:
            raise ConfigError(f"data.balance={self.data.balance}: {reason}; nearest valid: data.balance=none")

    def _check_ping_pong(self) -> None:
        strategy, rows = self.attention.strategy, self.train.micro_batch
        if strategy != "disaggregated":
            raise ConfigError(
                f"attention.ping_pong=true takes attention.strategy=disaggregated apart, got {strategy}; nearest "
                "valid: attention=disaggregated, or attention.ping_pong=false"
            )
        if rows % 2:
            raise ConfigError(
                f"attention.ping_pong=true halves train.micro_batch={rows}, which must be even; nearest valid: "
                f"{nearest_multiples(rows, 2)}"
            )
        if self.train.compile:
            raise ConfigError(
                "attention.ping_pong=true hands runs of attention from operator to operator, which train.compile=true "
                "might put in another order; set train.compile=false"
            )

    def _check_servers(self) -> None:
        """Stages that serve one another take tasks, go through their ticks in step, and exchange once a layer."""
        attention, parallel, train = self.attention, self.parallel, self.train
        kept = train.recompute_keep
        rules = (
            (
                attention.strategy in choices.SERVED_STRATEGIES,
                f"attention.strategy={attention.strategy} has no servers",
                "attention=disaggregated",
            ),
            (
                parallel.pp > 1,
                f"parallel.pp={parallel.pp} has no other stages",
                "parallel.pp=2 with parallel.pp_schedule=gpipe",
            ),
            (
                parallel.pp_schedule == "gpipe",
                f"parallel.pp_schedule={parallel.pp_schedule} has stages in both passes at one time, where all must be "
                "in one",
                "parallel.pp_schedule=gpipe",
            ),
            (
                not attention.ping_pong,
                "attention.ping_pong=true makes two exchanges of a layer, and a tick has one",
                "attention.ping_pong=false",
            ),
            (
                not train.compile,
                "train.compile=true might put exchanges in another order than that of the layers",
                "train.compile=false",
            ),
            (
                kept is None or "attention" in kept,
                f"train.recompute_keep=[{','.join(kept or ())}] would run attention again in backward ticks",
                "train.recompute_keep=[attention]",
            ),
        )
        for holds, why, nearest in rules:
            if not holds:
                raise ConfigError(
                    f"attention.servers=pipeline: {why}; nearest valid: {nearest}, or attention.servers=sequence"
                )

    def _check_layers(self) -> None:
        """Strategies fit the kinds of layers that there are, and nothing is set for a kind that there is not."""
        attention, pattern, default = self.attention, self.model.pattern, AttentionConfig()
        linear = attention.strategy in choices.LINEAR_STRATEGIES
        if linear and "S" in pattern:
            nearest = "attention=lasp2h" if "L" in pattern else "attention.strategy=ring"
            raise ConfigError(
                f"attention.strategy={attention.strategy} is for linear layers, and model.pattern={pattern} has "
                f"softmax layers; nearest valid: {nearest}"
            )
        if not linear and "S" not in pattern:
            raise ConfigError(
                f"attention.strategy={attention.strategy} is for softmax layers, and model.pattern={pattern} has none; "
                f"nearest valid: attention={self.linear_strategy}"
            )
        if linear and attention.linear is not None:
            raise ConfigError(
                f"attention.linear={attention.linear}: attention.strategy={attention.strategy} says already who moves "
                f"the states; use attention={attention.linear} and leave attention.linear at null"
            )
        if "S" not in pattern and "attention_tail" in (self.train.recompute_keep or ()):
            raise ConfigError(
                f"train.recompute_keep=[attention_tail] keeps half of softmax attention, and model.pattern={pattern} "
                "has none; nearest valid: train.recompute_keep=[attention]"
            )
        unread: tuple[str, ...] = ("linear", "chunk") if "L" not in pattern else ()
        if linear:
            unread = ("window", "kernel", "inner", "backward", "travel")
        for name in unread:
            value = getattr(attention, name)
            if value != getattr(default, name):
                kind = "linear" if "L" not in pattern else "softmax"
                raise ConfigError(
                    f"attention.{name}={as_word(value)} is for {kind} layers, and model.pattern={pattern} "
                    f"has none that reads it; leave attention.{name} at {as_word(getattr(default, name))}"
                )

    def _check_pipeline(self) -> None:
        parallel, train, layers = self.parallel, self.train, self.model.layers
        if parallel.stages > layers:
            virtual = parallel.stages // parallel.pp
            raise ConfigError(
                f"parallel.pp={parallel.pp} with {virtual} stage{'s' if virtual > 1 else ''} per rank "
                f"(parallel.pp_schedule={parallel.pp_schedule}) makes {parallel.stages} stages, and each needs a "
                f"layer: model.layers={layers}; nearest valid: {_fewer_stages(parallel, layers)}"
            )
        if RULES[parallel.pp_schedule].split_backward:
            given = {"recompute": train.recompute, "mlp_chunk": train.mlp_chunk, "compile": train.compile}
            for name, valid in (("recompute", "none"), ("mlp_chunk", None), ("compile", False)):
                value = given[name]
                if value != valid:
                    raise ConfigError(
                        f"train.{name}={as_word(value)} with parallel.pp_schedule={parallel.pp_schedule}: its backward "
                        "pass goes over each graph twice, for inputs and for weights, and would run attention's "
                        f"forward again; nearest valid: train.{name}={as_word(valid)}, or pp_schedule=interleaved_1f1b"
                    )


def _fewer_stages(parallel: ParallelConfig, layers: int) -> str:
    """Fewer ranks under the same schedule, or a schedule of one stage per rank, or no pipeline."""
    ranks = layers // (parallel.stages // parallel.pp)
    if ranks > 1:
        return f"parallel.pp={ranks}"
    ranks = min(parallel.pp, layers)
    words = f"parallel.pp={ranks} with parallel.pp_schedule={'gpipe' if ranks > 1 else '1f1b'}"
    return words if parallel.pp_virtual is None else f"{words} and parallel.pp_virtual=null"


def check_tensor_parallel(model: ModelConfig, tp: int) -> None:
    """Refuse degrees that do not split heads, hidden channels and vocabulary into equal parts."""
    problem = _unequal_part(model, tp)
    if problem is None:
        return
    valid = [degree for degree in divisors(model.heads) if _unequal_part(model, degree) is None]
    raise ConfigError(f"parallel.tp={tp} {problem}; nearest valid parallel.tp for this model: {nearest_of(tp, valid)}")


def _unequal_part(model: ModelConfig, tp: int) -> str | None:
    for name in ("heads", "hidden_dim", "vocab_size"):
        size = getattr(model, name)
        if size % tp:
            # Other heads would have to suit kv_heads as well.
            hint = "" if name == "heads" else f" (nearest valid model.{name}: {nearest_multiples(size, tp)})"
            return f"must divide model.{name}={size}{hint}"
    if model.kv_heads % tp and tp % model.kv_heads:
        return f"must divide model.kv_heads={model.kv_heads}, or be a multiple of it"
    return None
