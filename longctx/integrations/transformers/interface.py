"""The two functions that ``transformers`` calls by the name ``longctx``: attention of a layer, and its mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longctx.errors import ConfigError, DataError
from longctx.integrations.transformers.cut import PLAN, CutBatch

NAME = "longctx"
# Arguments that a layer passes on and that change nothing of what attention computes here.
HARMLESS = {"position_ids", "cache_position", "return_dict", "output_hidden_states", "logits_to_keep", "is_causal"}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Computes attention of a layer for this rank's tokens, q ``[B, H, T/SP, D]``, k and v ``[B, Hkv, T/SP, D]``."""
    cut = others.pop(PLAN, None)
    if not isinstance(cut, CutBatch):
        raise ConfigError(
            f"a model with attn_implementation={NAME!r} was called without its cut batch; "
            "call model(**sequence.shard(input_ids, ...).inputs). Generation is not cut: "
            "model.set_attn_implementation('sdpa') for that"
        )
    if module not in cut.sequence.layers:
        raise ConfigError(
            f"{type(module).__name__} belongs to no model that this sequence group has adopted; call "
            "sequence.adopt(model) after the model is made or copied, before it is wrapped"
        )
    _refuse(module, attention_mask, dropout, others)
    if sliding_window not in cut.plans:
        raise ConfigError(
            f"window {sliding_window} of {type(module).__name__} is not among those of the adopted model, "
            f"{sorted(map(str, cut.plans))}; adopt the model again after changing its windows"
        )
    _require_positions(cut, others)
    attention = cut.sequence.attention(scaling)
    q, k, v = (one.transpose(1, 2) for one in (query, key, value))
    out = attention(q, k, v, cut.plans[sliding_window].handle)
    if out.grad_fn is not None:
        node: Any = out.grad_fn
        node.metadata[PLAN] = cut  # or the plan could be gone before backward, as Trainer lets inputs go
    return out, None


def _refuse(module: nn.Module, mask: Any, dropout: float, others: dict[str, Any]) -> None:
    """Refuses arguments of a layer that would change numbers."""
    layer = type(module).__name__
    if mask is not None:
        raise ConfigError(
            f"{layer} was given an attention mask of its own, {tuple(getattr(mask, 'shape', ()))}; masks are not cut. "
            "Give padding and documents to sequence.shard"
        )
    if dropout:
        raise ConfigError(
            f"{layer} has dropout {dropout} of attention weights, whose draws differ by rank; set it to 0"
        )
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ConfigError(f"{layer} is not causal; bidirectional attention of transformers' models is not cut")
    if others.get("use_cache") or others.get("past_key_values") is not None:
        raise ConfigError(f"{layer} was called with use_cache=True; a cache of keys is not cut: use_cache=False")
    known = HARMLESS | {"use_cache", "past_key_values"}
    unknown = sorted(
        name for name, given in others.items() if name not in known and given is not None and given is not False
    )
    if unknown:
        raise ConfigError(
            f"{layer} passes {', '.join(unknown)} to attention, which {NAME} does not compute (softcap, s_aux: sinks, "
            "position_bias, output_attentions, cu_seq_lens); use another model, or leave the argument out"
        )


def _require_positions(cut: CutBatch, others: dict[str, Any]) -> None:
    """Refuses a model that has turned its queries by other positions than the batch's global ones."""
    used = others.get("position_ids")
    if used is cut.position_ids:
        return
    rule = "model(**cut.inputs) must turn tokens by cut.position_ids, the global positions"
    if used is None or used.shape != cut.position_ids.shape:
        raise DataError(f"{rule}; its layers have {None if used is None else tuple(used.shape)} positions")
    same = (used == cut.position_ids.to(used.device)).all()
    if used.device.type == "cpu":
        if not same:
            raise DataError(f"{rule}; its layers have others: pass position_ids on to the model")
    else:
        torch._assert_async(same, rule)  # reads nothing back: no device waits


def no_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **others: Any,
) -> None:
    """Makes no mask, as the plan has it; refuses what a plan does not have."""
    if attention_mask is not None:
        raise ConfigError(
            "attention_mask was given to the model; give it to sequence.shard, which takes padding as the end of a "
            "document, and call model(**cut.inputs)"
        )
    if use_vmap:
        raise ConfigError("the model lays another mask over the causal one (or_mask, and_mask), which is not cut")
    cached = (isinstance(q_offset, int) and q_offset) or kv_offset or q_length != kv_length
    if cached:
        raise ConfigError(
            f"{q_length} queries are to see {kv_length} keys: a cache is under way, and generation is not cut. "
            "model.set_attn_implementation('sdpa') for it"
        )
