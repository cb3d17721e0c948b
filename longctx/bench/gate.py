"""Checks every strategy on a small shape, on the run's own ranks, against the reference, before anything is timed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention.runtime.local_kernel import KernelProblem, select_kernel
from longctx.comm import group_of
from longctx.errors import ConfigError, NumericsError
from longctx.verify import VerifyCase
from longctx.verify.case import DTYPES, ROUNDING_FACTOR, TOLERANCE
from longctx.verify.run import core_of, local_inputs, reference, shared_inputs, whole_inputs

GATE_TOKENS = 509  # a prime, so that no layout cuts it evenly


def require_exact(case: VerifyCase, group: dist.ProcessGroup | None, device: torch.device) -> dict[str, float]:
    """Refuses to go on unless the case is exact at a small shape; returns its errors by tensor.

    It is computed in float64 first, where the kernel has that, then in the run's own dtype. What comes first is
    returned.

    All ranks of the world call it together. Raises ``NumericsError`` on all of them when a tensor is off by more than
    ``longctx verify`` allows.
    """
    small = shrunk(case)
    dtypes = [case.dtype] if case.dtype == "float64" or not _has_float64(small, device) else ["float64", case.dtype]
    found = []
    for dtype in dtypes:
        asked = replace(small, dtype=dtype)
        errors = errors_of(asked, group, device)
        limits = _limits(asked, device)
        wrong = [name for name, error in errors.items() if not error <= limits[name]]
        if wrong:
            worst = max(wrong, key=lambda name: errors[name] / limits[name])
            raise NumericsError(
                f"{case.strategy} on {case.layout} is not exact on {small.seq} tokens in {dtype}: {worst} is off by "
                f"{errors[worst]:.1e}, more than {limits[worst]:.1e}; nothing is timed"
            )
        found.append(errors)
    return found[0]


def shrunk(case: VerifyCase) -> VerifyCase:
    """Returns the case with few tokens; documents and window shrink with them."""
    seq = min(case.seq, GATE_TOKENS)
    bounds = [0, *(end * seq // case.seq for end in itertools.accumulate(case.documents))]
    lengths = tuple(stop - start for start, stop in itertools.pairwise(bounds) if stop > start)
    window = None if case.window is None else max(1, case.window * seq // case.seq)
    return replace(case, seq=seq, documents=lengths, window=window, batch=min(case.batch, 2))


def errors_of(case: VerifyCase, group: dist.ProcessGroup | None, device: torch.device) -> dict[str, float]:
    """Returns the error of each tensor on the world's worst rank, by the rule of ``longctx verify``.

    What is not a number counts as infinite.
    """
    rank, shared, truth = group_of(group).rank, shared_inputs(case), reference(case)
    upstream = 1e-3 * whole_inputs(case)["dout"].double().norm()
    plan, rows = case.plan(), torch.from_numpy(case.plan().positions(rank))
    errors = []
    for name, mine in _computed(case, group, device).items():
        expected = truth[name]
        if name[1:] in shared:  # every rank has a share of the gradient
            if group is not None:
                dist.all_reduce(mine, group=group)
            difference = mine.double().cpu() - expected
        else:
            own = mine.double().cpu()
            padding = own[:, len(rows) : plan.shard]
            difference = torch.cat([own[:, : len(rows)] - expected[:, rows], padding], dim=1)
        errors.append(difference.norm() / (expected.norm() + upstream))
    worst = torch.stack(errors).nan_to_num(nan=torch.inf).to(device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(truth, worst.tolist(), strict=True))


def _computed(case: VerifyCase, group: dist.ProcessGroup | None, device: torch.device) -> dict[str, Tensor]:
    """Computes the output and all gradients of this rank's share, in the order of ``reference``."""
    plan, local, dout = local_inputs(case, group_of(group).rank)
    given = {name: tensor.detach().to(device).requires_grad_() for name, tensor in local.items()}
    out = core_of(case, group)(given, plan.handle)
    grads = torch.autograd.grad(out, list(given.values()), dout.to(device))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(given, grads, strict=True)}}


def _limits(case: VerifyCase, device: torch.device) -> dict[str, float]:
    """Returns how far each tensor may be off: so many times what the same kernel loses on one device."""
    least, most = TOLERANCE[case.dtype]
    names = ["out", *(f"d{name}" for name in whole_inputs(case) if name != "dout")]
    if least == most:
        return dict.fromkeys(names, most)
    alone = VerifyCase(
        "local" if case.mixer is None else case.strategy, "contiguous", 1, case.backend, case.seq, case.documents,
        case.heads, case.kv_heads, case.head_dim, case.dtype, case.window,
        kernel=case.kernel, mixer=case.mixer, chunk=case.chunk, mixer_block=case.mixer_block,
        mixer_top_k=case.mixer_top_k,
    )  # fmt: skip
    errors = errors_of(alone, None, device)
    return {name: min(max(least, ROUNDING_FACTOR * errors[name]), most) for name in names}


def _has_float64(case: VerifyCase, device: torch.device) -> bool:
    """Tells whether the case's kernel computes in float64 there."""
    if case.mixer is not None:
        return True
    problem = KernelProblem(device.type, DTYPES["float64"], case.heads, case.kv_heads, case.head_dim)
    try:
        select_kernel(case.kernel, problem)
    except ConfigError:
        return False
    return True
