"""The cases on which a sharded linear layer must equal its recurrence, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.linear import HeadDims, LinearAttention, get_mixer
from longctx.sequence import Contiguous, Documents, Layout, Mask, SequencePlan, Striped, Zigzag, make_plan

TOLERANCE = 1e-10
BLOCK = 8
CHUNK = {"contiguous": 16, "zigzag": 16, "striped": 5, "wide": 64}
LAYOUTS: dict[str, Layout] = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped(BLOCK)}
MIXERS = ("basic", "retnet", "simple_gla", "gla", "gated_deltanet")
STRATEGIES = ("lasp2", "lasp", "headwise")
PACKINGS = ("one", "edges", "short", "few")
WORLDS = (1, 2, 3, 4, 8)
HEADS, WIDTHS = 3, HeadDims(5, 4)


@dataclass(frozen=True)
class Problem:
    """What is computed, however it is cut. ``few``: fewer tokens than ranks; ``short``: shards shorter than a chunk."""

    mixer: str
    packing: str

    @property
    def length(self) -> int:
        return {"one": 131, "edges": 131, "short": 31, "few": 3}[self.packing]

    @property
    def documents(self) -> tuple[Documents, ...]:
        half = self.length // 2  # an edge of contiguous and zigzag shards
        rows = {
            "one": ((131,), (131,)),
            "edges": ((31, 1, 1, half - 34, 1, 1, 1, self.length - half - 2), (16, 1, 47, 1, 20)),
            "short": ((31,), (7, 1, 1, 13)),
            "few": ((3,), (1, 1, 1)),
        }[self.packing]
        return tuple(Documents.from_lengths(row) for row in rows)


@dataclass(frozen=True)
class Case:
    mixer: str
    strategy: str
    layout: str
    packing: str
    world: int
    chunk: int = 0

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))

    @property
    def problem(self) -> Problem:
        return Problem(self.mixer, self.packing)

    def plan(self, causal: bool = True) -> SequencePlan:
        return make_plan(self.problem.documents, Mask(causal), LAYOUTS[self.layout], self.problem.length, self.world)


def all_cases() -> Iterator[Case]:
    """Cases of one problem follow one another, so that its reference is computed once."""
    for mixer, packing in itertools.product(MIXERS, PACKINGS):
        for strategy, layout, world in itertools.product(STRATEGIES, LAYOUTS, WORLDS):
            yield Case(mixer, strategy, layout, packing, world)


@lru_cache(maxsize=4)
def inputs(problem: Problem) -> dict[str, Tensor]:
    """Of tokens ``[B, S, H, c]`` and of heads ``[H, ...]``, and the upstream gradient ``dout``."""
    mixer, generator = get_mixer(problem.mixer), torch.Generator().manual_seed(problem.length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = {**mixer.tokens(WIDTHS), "dout": WIDTHS.value}
    by_token = {name: draw(2, problem.length, HEADS, channels) for name, channels in tokens.items()}
    learned = {name: draw(HEADS, *shape) for name, shape in mixer.parameters(WIDTHS).items()}
    return {**by_token, **learned, **mixer.constants(HEADS, 0, 2)}


@lru_cache(maxsize=4)
def reference(problem: Problem) -> dict[str, Tensor]:
    """out, and the gradient of every input by its name."""
    whole = inputs(problem)
    leaves = {name: value.clone().requires_grad_() for name, value in whole.items() if name != "dout"}
    out = get_mixer(problem.mixer).recurrence(leaves, problem.documents)
    grads = torch.autograd.grad(out, list(leaves.values()), whole["dout"])
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def cut(whole: Tensor, plan: SequencePlan, rank: int) -> Tensor:
    """The rank's rows; what lies past them is noise that must not matter."""
    where = torch.from_numpy(plan.positions(rank))
    local = torch.full((whole.shape[0], plan.shard, *whole.shape[2:]), 7.25, dtype=whole.dtype)
    local[:, : len(where)] = whole[:, where]
    return local


def compute(case: Case) -> dict[str, Tensor]:
    """Forward and backward of the calling rank's share."""
    mixer, plan, whole = get_mixer(case.mixer), case.plan(), inputs(case.problem)
    by_token = {*mixer.tokens(WIDTHS), "dout"}
    local = {
        name: cut(value, plan, dist.get_rank()) if name in by_token else value.clone() for name, value in whole.items()
    }
    dout = local.pop("dout")
    for tensor in local.values():
        tensor.requires_grad_()
    core = LinearAttention(case.strategy, dist.group.WORLD, case.chunk or CHUNK[case.layout])
    out = mixer.mix(local, core, plan.handle)
    grads = torch.autograd.grad(out, list(local.values()), dout)
    return {"out": out.detach(), **dict(zip(local, grads, strict=True))}


def assert_exact(case: Case, ranks: list[dict[str, Tensor]]) -> None:
    """Every tensor is the reference's share, and zero on padding rows; parameters' gradients add up over ranks."""
    plan, truth = case.plan(), reference(case.problem)
    upstream = inputs(case.problem)["dout"].norm()
    by_token = {*get_mixer(case.mixer).tokens(WIDTHS), "out"}
    for name, expected in truth.items():
        bound = TOLERANCE * (expected.norm() + 1e-3 * upstream)
        if name not in by_token:
            error = (sum(computed[name] for computed in ranks) - expected).norm()
            assert error <= bound, f"{case}: d{name} is off by {error:.2e}, at most {bound:.2e}"
            continue
        for rank, computed in enumerate(ranks):
            local, where = computed[name], torch.from_numpy(plan.positions(rank))
            assert local.dtype == torch.float64 and local.shape[:2] == (2, plan.shard)
            error = (local[:, : len(where)] - expected[:, where]).norm()
            assert error <= bound, f"{case}: {name} of rank {rank} is off by {error:.2e}, at most {bound:.2e}"
            assert not local[:, len(where) :].any(), f"{case}: {name} of rank {rank} has padding rows that are not 0"
