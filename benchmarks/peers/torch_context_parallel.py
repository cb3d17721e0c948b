"""Trains by a plain PyTorch loop: context parallel, FSDP2, recompute of every block, cross-entropy of the logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.attention import Prepared, inputs_of
from longctx.attention.core import Started
from longctx.model import Decoder
from longctx.verify import VerifyCase


class Sdpa:
    """Calls the attention function that ``context_parallel`` replaces while it is entered."""

    def start(self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor) -> Started:
        """Computes all of it; nothing is left for ``finish`` to wait for."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return Started(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))

    def finish(self, started: Started) -> Tensor:
        """Returns the output that ``start`` computed."""
        return started.out


def prepare(model: Decoder, lr: float, tile: int) -> Callable[[Tensor, Tensor], float]:
    """Prepares the loop's step. ``tile`` is of no use here: PyTorch's own examples have nothing that it could cut."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.experimental import context_parallel

    teach_cpu()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    model.set_attention(Sdpa())
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def step(tokens: Tensor, labels: Tensor) -> float:
        positions = torch.arange(tokens.shape[1])[None].clone()
        shared = [tokens.clone(), labels.clone(), positions]
        with context_parallel(mesh, buffers=shared, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(shared)):
            own_tokens, own_labels, own_positions = shared
            logits = model(own_tokens, own_positions, torch.empty(0))
            loss = F.cross_entropy(logits.flatten(0, 1), own_labels.flatten())
            # Logits are the largest tensor of the step; who keeps their name keeps them through backward.
            del logits
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach()
        dist.all_reduce(mean)
        return float(mean) / dist.get_world_size()

    return step


def prepare_attention(rotation: str, case: VerifyCase) -> Prepared:
    """Prepares PyTorch's context parallel attention for one case on this rank, causal work balanced head to tail.

    ``rotation``: of keys and values, "alltoall" (a ring) or "allgather".
    """
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    teach_cpu()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))

    def positions_here() -> Tensor:
        """Returns what the context cuts for this rank; it wants at least one buffer to cut."""
        return torch.arange(case.seq)[None].clone()

    own = positions_here()
    with context_parallel(mesh, buffers=[own], buffer_seq_dims=[1], no_restore_buffers={own}):
        positions = own[0].clone()
    (q, k, v), dout = inputs_of(case, positions)

    def run() -> tuple[Tensor, ...]:
        set_rotate_method(rotation)
        shared = positions_here()
        with context_parallel(mesh, buffers=[shared], buffer_seq_dims=[1], no_restore_buffers={shared}):
            queries, keys, values = (tensor.transpose(1, 2) for tensor in (q, k, v))
            grouped = case.heads != case.kv_heads
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
            out = out.transpose(1, 2)
            return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    return Prepared(f"head-tail, {rotation}", positions, run)


@cache
def teach_cpu() -> None:
    """Registers the CPU's flash kernel with context parallel, which knows only those of CUDA; the ring is its own."""
    import torch.distributed.tensor.experimental._context_parallel._attention as attention
    import torch.distributed.tensor.experimental._context_parallel._sharding_rules as rules
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    rings = {
        forward: partial(_ring_forward, attention, forward),
        backward: partial(_ring_backward, attention, backward),
    }

    def handle(op_call: Any, args: Any, kwargs: Any) -> Any:
        dispatcher = DTensor._op_dispatcher
        info = dispatcher.unwrap_to_op_info(op_call, args, kwargs)
        dispatcher.sharding_propagator.propagate(info)
        sharding = info.output_sharding
        assert sharding is not None and not sharding.needs_redistribute
        return dispatcher.wrap(
            rings[op_call](info.compute_mesh, *info.local_args, **info.local_kwargs), sharding.output_spec
        )

    register = rules.register_cp_sharding_rules

    def register_with_cpu() -> None:
        if rules._cp_strategy_contexts:
            return
        register()
        for operator, outputs in ((forward, 2), (backward, 3)):
            schema = RuntimeSchemaInfo(4) if operator is forward else None
            context = rules._op_strategy_context(operator, partial(_sharded, outputs), schema)
            original = context.__enter__()
            rules._cp_strategy_contexts[operator] = context
            rules._original_strategies[operator] = original

    attention.custom_ops.update({forward: handle, backward: handle})
    rules.register_cp_sharding_rules = register_with_cpu


def _sharded(outputs: int, schema: Any) -> Any:
    """Declares that all tensors of the kernel are cut along the sequence, their dim 2."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    tensors = 5 if outputs == 2 else 9
    mesh = schema.get_mesh_from_args(validate=outputs == 2)
    return expand_to_full_mesh_op_strategy(mesh, schema, [[Shard(2)] * tensors], input_index=outputs)


def _ring_forward(
    attention: Any, operator: Any, mesh: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0,
    is_causal: bool = False, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    return attention._templated_ring_attention(
        mesh.get_group(), 2, operator, query=q, key=k, value=v, is_causal=is_causal, dropout_p=dropout_p, scale=scale
    )


def _ring_backward(
    attention: Any, operator: Any, mesh: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dropout_p: float, is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    return attention._templated_ring_attention_backward(
        mesh.get_group(), 2, operator, grad_out=dout, grad_out_name="grad_out", query=q, key=k, value=v, out=out,
        logsumexp=lse, is_causal=is_causal, dropout_p=dropout_p, scale=scale,
    )  # fmt: skip
