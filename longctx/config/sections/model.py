"""Configures the decoder: its sizes, and the kinds of its layers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from longctx.catalog import MIXERS
from longctx.config.readers import for_some, refuse_unread
from longctx.config.sections.linear import NORMS, LinearConfig, LinearHeads
from longctx.config.sections.rope import RopeConfig
from longctx.errors import ConfigError
from longctx.rules import above, as_word, at_least, divisors, nearest_multiples, nearest_of, one_of

# Of a layer, in model.pattern: softmax attention, the same within model.window, linear attention.
LAYER_KINDS = ("S", "W", "L")
SOFTMAX_KINDS = ("S", "W")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BIASES = ("none", "qkv", "all")
QK_NORM_DIMS = ("head", "width")


@dataclass(frozen=True)
class ModelConfig:
    """Configures a decoder: its sizes, and what its family does otherwise than Llama."""

    name: str = "tiny"
    path: str | None = None  # of model=hf: a directory as Hugging Face has them, where the weights come from
    vocab_size: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden_dim: int = 384  # width of SwiGLU
    rope_theta: float = 10_000.0
    rope: RopeConfig = field(default_factory=RopeConfig)
    rope_window: RopeConfig = field(default_factory=RopeConfig)  # of layers with a window; rope_type null: model.rope
    norm: str = "pre"  # pre: of a branch's input; post: of its output; both
    norm_eps: float = 1e-5
    norm_plus_one: bool = False  # weights of norms are stored as what they exceed 1 by
    qk_norm: bool = False
    qk_norm_dim: str = "head"  # what is normed: each head, or the width of all heads
    attention_bias: str = "none"  # of the projections: none, qkv or all
    mlp_bias: bool = False
    output_gate: bool = False  # what softmax layers read is gated by a sigmoid, projected with the queries
    activation: str = "silu"  # of the gated MLP: silu, gelu or gelu_tanh
    query_scale: float | None = None  # of q·k; null: head_dim ** -0.5
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    tie_embeddings: bool = True
    init_std: float = 0.06  # falls with the width: 0.02 suits 2,048 and more
    pattern: str = "S"  # kinds of layers, repeated: S softmax attention, W the same within window, L linear attention
    window: int | None = None  # tokens that a query of a W layer sees, itself among them
    mixer: str | None = None  # what linear layers compute
    linear: LinearConfig = field(default_factory=LinearConfig)  # of linear layers, where they differ from the others
    mixer_block: int | None = for_some(None)  # tokens of a block of moba, of a chunk of rat; null: the paper's
    mixer_top_k: int | None = for_some(None)  # blocks that a query of moba reads, its own among them; null: the paper's

    @property
    def kinds(self) -> str:
        """Returns the kind of each layer, one letter a layer."""
        return (self.pattern * self.layers)[: self.layers]

    @property
    def has_softmax(self) -> bool:
        """Whether any layer has softmax attention."""
        return self.softmax_layers > 0

    @property
    def softmax_layers(self) -> int:
        """Counts the layers of softmax attention, whatever their window."""
        return sum(kind in SOFTMAX_KINDS for kind in self.kinds)

    def norm_of(self, kind: str) -> str:
        """Returns where the branches of a kind of layers are normed."""
        return self.linear.norm or self.norm if kind == "L" else self.norm

    @property
    def linear_heads(self) -> LinearHeads:
        """Counts the heads of a linear layer."""
        return self.linear.heads(self.heads, self.head_dim)

    def rope_of(self, kind: str) -> RopeConfig:
        """Returns the section that holds for the layers of a kind."""
        return self.rope_window if kind == "W" and self.rope_window.rope_type is not None else self.rope

    def settled(self, seq_len: int) -> ModelConfig:
        """Returns the model with the length that its tables of positions are made for, where they depend on one."""
        return replace(self, rope=self.rope.settled(seq_len), rope_window=self.rope_window.settled(seq_len))

    @property
    def mixer_sizes(self) -> dict[str, int | bool | None]:
        """Returns the fields that make some mixers others, by name."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata.get("for_some")}
        return {**own, **self.linear.mixer_sizes}

    def check(self) -> None:
        """Refuses sizes that no decoder can have."""
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "hidden_dim"):
            at_least(f"model.{name}", getattr(self, name), 1)
        for name, choices in (
            ("norm", NORMS),
            ("activation", ACTIVATIONS),
            ("attention_bias", BIASES),
            ("qk_norm_dim", QK_NORM_DIMS),
        ):
            one_of(f"model.{name}", getattr(self, name), choices)
        for name in ("rope_theta", "norm_eps", "init_std", "query_scale", "embedding_scale", "logit_scale"):
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
        self.rope.check("model.rope", self.head_dim)
        if self.rope.rope_theta not in (None, self.rope_theta) and self.rope_theta != type(self).rope_theta:
            raise ConfigError(
                f"model.rope_theta={self.rope_theta} and model.rope.rope_theta={self.rope.rope_theta} say the same "
                "thing and differ; set one of them"
            )
        self._check_kinds()
        self._check_window()

    def _check_window(self) -> None:
        at_least("model.window", self.window, 1)
        if (self.window is None) == ("W" in self.pattern):
            told = "has layers with one" if self.window is None else "has no layer with one"
            raise ConfigError(
                f"model.window={as_word(self.window)}: model.pattern={self.pattern} {told}; nearest valid: "
                f"{'model.window=4096' if self.window is None else 'model.window=null'}, or W in model.pattern"
            )
        if self.rope_window.is_set:
            if "W" not in self.pattern or self.rope_window.rope_type is None:
                raise ConfigError(
                    "model.rope_window is of layers with a window: it takes W in model.pattern, and a rope_type; "
                    f"got model.pattern={self.pattern}, rope_type={as_word(self.rope_window.rope_type)}"
                )
            self.rope_window.check("model.rope_window", self.head_dim)
        if self.qk_norm_dim != "head" and not self.qk_norm:
            raise ConfigError(
                f"model.qk_norm_dim={self.qk_norm_dim} says over what queries and keys are normed, and "
                "model.qk_norm=false; set model.qk_norm=true, or model.qk_norm_dim=head"
            )

    def _check_linear(self) -> None:
        if "L" not in self.pattern and self.linear.is_set:
            raise ConfigError(
                f"model.linear is of linear layers, and model.pattern={self.pattern} has none; leave it out, or put L "
                "in model.pattern"
            )
        self.linear.check("model.linear", self.heads)

    def _check_kinds(self) -> None:
        if set(self.pattern) - set(LAYER_KINDS):
            near = "".join(letter for letter in self.pattern.upper() if letter in LAYER_KINDS)
            raise ConfigError(
                f"model.pattern={self.pattern} must be made of S (softmax attention), W (the same in a window) "
                f"and L (linear attention); nearest valid: {near or 'S'}"
            )
        if len(self.pattern) > self.layers:
            raise ConfigError(
                f"model.pattern={self.pattern} is longer than model.layers={self.layers}; nearest valid: "
                f"model.layers={len(self.pattern)}, or model.pattern={self.kinds}"
            )
        if self.mixer is not None:
            MIXERS.require(self.mixer)
        refuse_unread(self, "model", MIXERS, self.mixer, "model.mixer")
        refuse_unread(self.linear, "model.linear", MIXERS, self.mixer, "model.mixer")
        for name in ("mixer_block", "mixer_top_k"):
            at_least(f"model.{name}", getattr(self, name), 1)
        self._check_linear()
        if (self.mixer is not None) != ("L" in self.pattern):
            told, near = (
                ("has linear layers, which need one", next(iter(MIXERS)))
                if self.mixer is None
                else ("has no linear layer that reads it", "null")
            )
            raise ConfigError(
                f"model.mixer={as_word(self.mixer)}: model.pattern={self.pattern} {told}; nearest valid: {near}"
            )
