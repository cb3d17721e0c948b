"""Checks rules that look across sections and need no world size: one function each, in the order of their use.

What a strategy, mixer, source or engine takes is asked of the object behind its name; no rule knows a name. The last
lines list all rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from longctx.catalog import ENGINES, LINEAR_STRATEGIES, SOURCES, STRATEGIES
from longctx.config.pipeline import RULES as SCHEDULES
from longctx.config.sections import AttentionConfig, ModelConfig, ParallelConfig
from longctx.errors import ConfigError
from longctx.options import OPTIONS
from longctx.rules import as_word, divisors, nearest_multiples, nearest_of

if TYPE_CHECKING:
    from longctx.config.schema import Config


def tensor_parallel(config: Config) -> None:
    """Refuses degrees that do not split heads, hidden channels and vocabulary into equal parts."""
    model, tp = config.model, config.parallel.tp
    problem = _unequal_part(model, tp)
    if problem is None:
        return
    valid = [degree for degree in divisors(model.heads) if _unequal_part(model, degree) is None]
    raise ConfigError(f"parallel.tp={tp} {problem}; nearest valid parallel.tp for this model: {nearest_of(tp, valid)}")


def vocabulary(config: Config) -> None:
    """Refuses a vocabulary that lacks ids which the data source delivers; those of a tokenizer are known later."""
    if config.data.tokenizer is None:
        SOURCES.load(config.data.source).require_vocabulary(config.model.vocab_size)


def memory_report(config: Config) -> None:
    """Refuses a memory report of what is compiled."""
    if config.logger.memory and config.train.compile:
        raise ConfigError(
            "logger.memory=true looks at every operator, which train.compile=true leaves no trace of; "
            "set logger.memory=false or null, or train.compile=false"
        )


def layers(config: Config) -> None:
    """Refuses strategies that no layer of the model asks for."""
    attention, pattern = config.attention, config.model.pattern
    linear = attention.strategy in LINEAR_STRATEGIES
    softmax = config.model.has_softmax
    if linear and softmax:
        also = f" with attention.linear={attention.strategy}" if "L" in pattern else ""
        raise ConfigError(
            f"attention.strategy={attention.strategy} is for linear layers, and model.pattern={pattern} has "
            f"softmax layers; nearest valid: attention.strategy={AttentionConfig.strategy}{also}"
        )
    if not linear and not softmax:
        raise ConfigError(
            f"attention.strategy={attention.strategy} is for softmax layers, and model.pattern={pattern} has none; "
            f"nearest valid: attention={config.linear_strategy}"
        )
    if linear and attention.linear is not None:
        raise ConfigError(
            f"attention.linear={attention.linear}: attention.strategy={attention.strategy} says already who moves "
            f"the states; use attention={attention.linear} and leave attention.linear at null"
        )
    if not softmax and "attention_half" in (config.train.recompute_keep or ()):
        raise ConfigError(
            f"train.recompute_keep=[attention_half] keeps half of softmax attention, and model.pattern={pattern} "
            "has none; nearest valid: train.recompute_keep=[attention]"
        )


def options_of_layers(config: Config) -> None:
    """Refuses what is set for a kind of layer that there is not."""
    attention, pattern, default = config.attention, config.model.pattern, AttentionConfig()
    unread: tuple[str, ...] = ("linear", "chunk") if "L" not in pattern else ()
    if attention.strategy in LINEAR_STRATEGIES:
        unread = ("window", "kernel", *OPTIONS)
    for name in unread:
        value = getattr(attention, name)
        if value != getattr(default, name):
            kind = "linear" if "L" not in pattern else "softmax"
            raise ConfigError(
                f"attention.{name}={as_word(value)} is for {kind} layers, and model.pattern={pattern} "
                f"has none that reads it; leave attention.{name} at {as_word(getattr(default, name))}"
            )


def windows(config: Config) -> None:
    """Refuses two windows, and layers of several masks under stages that serve one."""
    window, attention = config.model.window, config.attention
    if window is not None and attention.window is not None:
        raise ConfigError(
            f"attention.window={attention.window} is of all softmax layers, and model.window={window} of those that "
            "model.pattern marks W; set one of them"
        )
    if window is not None and attention.server_pool == "pipeline":
        raise ConfigError(
            f"attention.server_pool=pipeline serves layers of one mask, and model.pattern={config.model.pattern} has "
            "windows of its own; nearest valid: attention.server_pool=sequence"
        )


def rope_length(config: Config) -> None:
    """Refuses a table of positions for a shorter sequence than the run's."""
    for name in ("rope", "rope_window"):
        length = getattr(config.model, name).length
        if length is not None and length < config.data.seq_len:
            raise ConfigError(
                f"model.{name}.length={length} is what the table of positions is made for, and data.seq_len="
                f"{config.data.seq_len} is longer; nearest valid value: {config.data.seq_len}, or null for that"
            )


def balance(config: Config) -> None:
    """Refuses to balance rows of equal work: it differs only where softmax layers mask documents from one another."""
    reason = None
    if not config.attention.document_mask:
        reason = "with attention.document_mask=false all rows have the same work"
    elif not config.model.has_softmax:
        reason = f"model.pattern={config.model.pattern} has no softmax layer, whose work depends on the documents"
    if reason and config.data.balance != "none":
        raise ConfigError(f"data.balance={config.data.balance}: {reason}; nearest valid: data.balance=none")


def ping_pong(config: Config) -> None:
    """Refuses halves that take turns under a strategy that is not taken apart, or of what cannot be halved."""
    attention, rows = config.attention, config.train.micro_batch
    if not attention.ping_pong:
        return
    apart = _strategies(lambda one: one.ping_pong)
    if attention.strategy not in apart:
        raise ConfigError(
            f"attention.ping_pong=true takes attention.strategy={' or '.join(apart)} apart, got {attention.strategy}; "
            f"nearest valid: attention={apart[0]}, or attention.ping_pong=false"
        )
    if rows % 2:
        raise ConfigError(
            f"attention.ping_pong=true halves train.micro_batch={rows}, which must be even; nearest valid: "
            f"{nearest_multiples(rows, 2)}"
        )
    if config.train.compile:
        raise ConfigError(
            "attention.ping_pong=true hands runs of attention from operator to operator, which train.compile=true "
            "might put in another order; set train.compile=false"
        )


def server_pool(config: Config) -> None:
    """Refuses stages that serve one another unless they take tasks, tick in step, and exchange once a layer."""
    attention, parallel, train = config.attention, config.parallel, config.train
    if attention.server_pool != "pipeline":
        return
    kept, serving = train.recompute_keep, _strategies(lambda one: one.serves_tasks)
    rules = (
        (
            attention.strategy in serving,
            f"attention.strategy={attention.strategy} has no servers",
            f"attention={serving[0]}",
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
                f"attention.server_pool=pipeline: {why}; nearest valid: {nearest}, or attention.server_pool=sequence"
            )


def nics(config: Config) -> None:
    """Refuses several NICs under a strategy whose messages are not routed."""
    if config.cluster.nics == 1:
        return
    serving = _strategies(lambda one: one.serves_tasks)
    if config.attention.strategy not in serving:
        raise ConfigError(
            f"cluster.nics={config.cluster.nics} routes the messages of {' and '.join(serving)}, "
            f"got attention.strategy={config.attention.strategy}; nearest valid: cluster.nics=1"
        )


def pipeline(config: Config) -> None:
    """Refuses stages without a layer, schedules that their options do not suit, and options without a pipeline."""
    parallel, train, count = config.parallel, config.train, config.model.layers
    if parallel.pp == 1:
        if (parallel.pp_schedule, parallel.pp_virtual) != ("1f1b", None):
            raise ConfigError(
                f"parallel.pp_schedule={parallel.pp_schedule} with parallel.pp_virtual={parallel.pp_virtual} "
                "is for a pipeline, and parallel.pp=1 has none; set parallel.pp=2, or leave both out"
            )
        return
    if parallel.stages > count:
        virtual = parallel.stages // parallel.pp
        raise ConfigError(
            f"parallel.pp={parallel.pp} with {virtual} stage{'s' if virtual > 1 else ''} per rank "
            f"(parallel.pp_schedule={parallel.pp_schedule}) makes {parallel.stages} stages, and each needs a "
            f"layer: model.layers={count}; nearest valid: {_fewer_stages(parallel, count)}"
        )
    if SCHEDULES[parallel.pp_schedule].split_backward:
        given = {"recompute": train.recompute, "mlp_chunk": train.mlp_chunk, "compile": train.compile}
        for name, valid in (("recompute", "none"), ("mlp_chunk", None), ("compile", False)):
            value = given[name]
            if value != valid:
                raise ConfigError(
                    f"train.{name}={as_word(value)} with parallel.pp_schedule={parallel.pp_schedule}: its backward "
                    "pass goes over each graph twice, for inputs and for weights, and would run attention's "
                    f"forward again; nearest valid: train.{name}={as_word(valid)}, or pp_schedule=interleaved_1f1b"
                )


def engine(config: Config) -> None:
    """Refuses what the engine does not execute."""
    reason = ENGINES.load(config.engine.name).refuses(config)
    if reason:
        raise ConfigError(f"engine={config.engine.name} refuses: {reason}")


def _strategies(able: Callable[[Any], bool]) -> list[str]:
    """Lists the names of the strategies of softmax attention that are ``able``."""
    return [name for name in STRATEGIES if able(STRATEGIES.load(name))]


def _unequal_part(model: ModelConfig, tp: int) -> str | None:
    for name in ("heads", "hidden_dim", "vocab_size"):
        size = getattr(model, name)
        if size % tp:
            # Other heads would have to suit kv_heads as well.
            hint = "" if name == "heads" else f" (nearest valid model.{name}: {nearest_multiples(size, tp)})"
            return f"must divide model.{name}={size}{hint}"
    linear = model.linear_heads
    for name, size in (("key_heads", linear.key_heads), ("value_heads", linear.value_heads)):
        if "L" in model.pattern and size % tp:
            return f"must divide model.linear.{name}={size}"
    if model.kv_heads % tp and tp % model.kv_heads:
        return f"must divide model.kv_heads={model.kv_heads}, or be a multiple of it"
    return None


def _fewer_stages(parallel: ParallelConfig, layers: int) -> str:
    """Suggests fewer ranks under the same schedule, or a schedule of one stage per rank, or no pipeline."""
    ranks = layers // (parallel.stages // parallel.pp)
    if ranks > 1:
        return f"parallel.pp={ranks}"
    ranks = min(parallel.pp, layers)
    words = f"parallel.pp={ranks} with parallel.pp_schedule={'gpipe' if ranks > 1 else '1f1b'}"
    return words if parallel.pp_virtual is None else f"{words} and parallel.pp_virtual=null"


RULES: tuple[Callable[[Config], None], ...] = (
    tensor_parallel,
    vocabulary,
    memory_report,
    layers,
    options_of_layers,
    windows,
    rope_length,
    balance,
    ping_pong,
    server_pool,
    nics,
    pipeline,
    engine,
)
