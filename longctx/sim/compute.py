"""Records compute: the operators that a rank runs between its communication.

The cluster enters this mode in each rank thread when asked to (``trace_compute=True``), so that model code
needs no hook of its own. Flops come from torch's registry (``torch.utils.flop_counter``), where an operator
of ours registers its formula with ``register_flop_formula``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import _maybe_get_opdef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from longctx.sim.runtime import RankContext
from longctx.sim.tensors import dtype_name, nbytes, shapes
from longctx.sim.trace import Event

# The backend itself records communication; prim asks for properties of tensors, profiler marks ranges.
_NO_COMPUTE = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "prim", "profiler")
_aten = torch.ops.aten


def _cpu_flash_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_flash_backward_flops(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


# torch 2.13 has no formulas for the CPU kernels of scaled dot product attention. Like torch's own for CUDA,
# these count full attention, whatever the mask.
_CPU_FLOPS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_flash_backward_flops,
}


def _python_body(func: Any) -> Callable[..., Any] | None:
    """Returns the Python function that implements a custom operator on the CPU, None for other operators.

    An operator registered by a ``torch.library.Library`` names it as its ``python_body``.
    """
    if (named := getattr(func, "python_body", None)) is not None:
        body: Callable[..., Any] = named
        return body
    definition = None if func.namespace in ("aten", "prims") else _maybe_get_opdef(func._schema.name)
    if definition is None:
        return None
    kernels = definition._backend_fns
    return kernels.get("cpu") or kernels.get(None) or definition._init_fn


def _breaks_up(kind: Any) -> bool:
    """Whether a tensor type, such as DTensor, first turns operators into ones on its local parts."""
    return not issubclass(kind, FakeTensor) and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


class ComputeRecorder(TorchDispatchMode):
    """Adds a "compute" event to the rank's trace for every operator that touches data.

    Views are left out. A Python custom operator (``_python_body``) without a flop formula is opened up: its
    inner operators are recorded, in their order among the communication. Its body is called directly, so it
    communicates with fake tensors too, where its fake kernel would not. Any other operator is one event. DTensor also
    runs operators on fake tensors of global shape, to learn how results look; these are left out.

    Args:
        context: the rank.
        fake_mode: the run's own, None if its tensors are real.
    """

    def __init__(self, context: RankContext, fake_mode: FakeTensorMode | None) -> None:
        super().__init__()
        self._context = context
        self._fake_mode = fake_mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(_breaks_up, types)):
            return NotImplemented
        if func.namespace in _NO_COMPUTE or self._in_shape_propagation():
            return func(*args, **kwargs)
        packet = func.overloadpacket
        formula = _CPU_FLOPS.get(packet) or flop_registry.get(packet)
        if formula is None:
            body = _python_body(func)
            if body is not None:
                with self, torch._C._AutoDispatchBelowAutograd():
                    return body(*args, **kwargs)
            # Below autograd torch hands over composite operators whole; aten.matmul has no formula, mm has.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if not func.is_view:
            self._record(func, formula, args, kwargs, result)
        return result

    def _in_shape_propagation(self) -> bool:
        """Whether somebody entered a fake mode around this operator, above the run's own if it has one."""
        active: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if active is None:
            return False
        own = self._fake_mode
        return own is None or active is not own or len(own.enter_stack) > 1

    def _record(self, func: Any, formula: Callable[..., int] | None, args: Any, kwargs: Any, result: Any) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        event = Event(
            phase="compute",
            id=self._context.runtime.trace.next_id(),
            step=self._context.step,
            operation=f"{func.namespace}.{func.overloadpacket.__name__}",
            bytes=nbytes(inputs) + nbytes(outputs),
            shapes=shapes(inputs),
            dtype=dtype_name(inputs),
            flops=flops,
        )
        self._context.record(event)
