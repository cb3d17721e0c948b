"""Patches ``transformers`` so that its fp32 parts compute in the model's dtype, for a reference in fp64.

Whatever a model's dtype, ``transformers`` takes these parts to fp32 and back:

- RMSNorm in all its variants, among them Gemma's and Qwen 3.5's zero-centred and the gated ones of linear layers:
  ``hidden_states.to(torch.float32)``, ``x.float()``, ``gate.to(torch.float32)``;
- tables of RoPE, ``torch.arange(..., dtype=torch.float)`` with a ``1 / base ** x``, and their angles;
- softmax, ``softmax(..., dtype=torch.float32)``;
- the gated delta rule: its inputs, states and decays, ``A_log.float().exp()``.

No formula is written anew: under ``in_model_dtype`` each of these requests for fp32 is one for the model's dtype.
Of a model in fp32 it changes nothing. Tables of RoPE are made when a model is, so they are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Types whose table transformers makes anew for the longest position of each call.
BY_LENGTH = ("dynamic", "longrope")


class _InDtype(TorchFunctionMode):
    """Answers every request for fp32 by ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.float:
            return args[0].to(self._dtype)
        args = tuple(self._asked(value) for value in args)
        return function(*args, **{name: self._asked(value) for name, value in (kwargs or {}).items()})

    def _asked(self, value: Any) -> Any:
        return self._dtype if value is torch.float32 else value


@contextmanager
def in_model_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Lets ``transformers`` compute its fp32 parts in ``dtype`` inside the block, in this thread."""
    with _InDtype(dtype):
        yield


def make_tables(model: nn.Module, length: int) -> None:
    """Makes the tables of RoPE anew, by ``transformers``' own functions, in the dtype of the block around.

    ``length``: what types whose table depends on one are made for; after this no call changes them.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None:
            continue
        nested = isinstance(kinds, dict)
        for layer, kind in kinds.items() if nested else [(None, kinds)]:
            make = module.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
            by_length = {"seq_len": length} if kind in BY_LENGTH else {}
            table, factor = make(module.config, device=None, **by_length, **({"layer_type": layer} if nested else {}))
            prefix = f"{layer}_" if nested else ""
            module.register_buffer(f"{prefix}inv_freq", table, persistent=False)
            setattr(module, f"{prefix}attention_scaling", factor)
        # Or each call would choose a table by its own longest position.
        module.rope_type = dict.fromkeys(kinds, "default") if nested else "default"
