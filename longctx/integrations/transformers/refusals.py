"""What of a ``transformers`` model cannot be exact when its sequence is cut: found and named before any work.

Only attention is made to look beyond a rank's tokens. So every other part must see one token at a time, and attention
must be what our strategies compute. Families whose parity is tested are listed; others are refused by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from longctx.errors import ConfigError

# Every one is a case of tests/integrations/test_transformers_parity.py.
FAMILIES = ("gemma3_text", "llama", "mistral", "olmo2", "olmo3", "qwen2", "qwen3")
LAYERS = ("full_attention", "sliding_attention")
SOFTCAPS = ("attn_logit_softcapping", "attn_logit_softcap", "attention_logit_cap")
BY_LENGTH = ("dynamic", "longrope")


def require_model(model: nn.Module) -> None:
    """Refuses a model that would not be exact with its sequence cut. Raises ``ConfigError``."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise ConfigError(f"{type(model).__name__} is no model of transformers: it has no config with a model_type")
    reason = _of_config(config) or _of_modules(model) or _of_family(config)
    if reason:
        raise ConfigError(f"model_type {config.model_type} is not run under a sequence group: {reason}")


def _of_config(config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder sees both ways, and a decoder sees the encoder; take a decoder alone"
    kinds = sorted({kind for kind in getattr(config, "layer_types", None) or () if kind not in LAYERS})
    if kinds:
        return (
            f"it has layers of kind {', '.join(kinds)}, which would see only this rank's tokens and be wrong in "
            "silence; longctx train model=hf runs qwen3_5 and olmo_hybrid exactly"
        )
    for name in SOFTCAPS:
        if getattr(config, name, None):
            return f"{name}={getattr(config, name)}: attention logits are capped, which no strategy computes"
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        return "its attention is bidirectional; causal decoders are run"
    dropouts = {
        name: value
        for name, value in vars(config).items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, int | float) and value > 0
    }
    if dropouts:
        name, value = next(iter(dropouts.items()))
        return f"{name}={value}: draws would differ by rank; make the model with {name}=0.0"
    return None


def _of_modules(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return f"{name} is a convolution, which reads tokens of other ranks"
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"{name} has dropout {module.p}: draws would differ by rank; set it to 0"
        if any(one == "sinks" for one, _ in module.named_parameters(recurse=False)):
            return f"{name} has attention sinks, which no strategy computes"
        if hasattr(module, "layer_idx") and getattr(module, "is_causal", True) is False:
            return f"{name} is not causal; its attention is bidirectional"
    return None


def _of_family(config: Any) -> str | None:
    if config.get_text_config() is not config:
        return "it has parts beside the text; take its text model, such as Gemma3ForCausalLM"
    if config.model_type not in FAMILIES:
        return f"its parity is not tested, and other parts might see several tokens; tested are {', '.join(FAMILIES)}"
    return None


def attention_layers(model: nn.Module) -> dict[nn.Module, int | None]:
    """Returns the attention layers of a model with their windows."""
    config: Any = model.config
    found: dict[nn.Module, int | None] = {}
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "scaling") and hasattr(module, "o_proj"):
            window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
            found[module] = window if window is None else int(window)
    if len(found) != config.num_hidden_layers:
        raise ConfigError(
            f"{type(model).__name__} has {config.num_hidden_layers} layers and {len(found)} of attention were found; "
            "give the whole model, not a part of it"
        )
    return found


def rope_types(config: Any) -> set[str]:
    """Returns the kinds of RoPE that a configuration names, by layer type or once for all."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [one for one in given.values() if isinstance(one, dict)] or [given]
    return {str(one.get("rope_type", one.get("type", "default"))) for one in nested}
