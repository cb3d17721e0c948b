"""Nothing passes from a document to the next, nor from a token to an earlier one: not even a rounding error."""

import pytest
import torch
import torch.distributed as dist

from longctx.linear import LinearAttention, get_mixer
from longctx.sequence import Contiguous, Documents, Mask, Striped, Zigzag, make_plan, unshard
from longctx.sim import Cluster
from tests.linear.cases import MIXERS, STRATEGIES, WIDTHS, cut

LENGTH, HEADS, CHUNK = 48, 2, 8
LAYOUTS = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped(CHUNK)}


def inputs(mixer: str) -> dict[str, torch.Tensor]:
    found, generator = get_mixer(mixer), torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    tokens = {name: draw(1, LENGTH, HEADS, width) for name, width in found.tokens(WIDTHS).items()}
    learned = {name: draw(HEADS, *shape) for name, shape in found.parameters(WIDTHS).items()}
    fixed = {name: value.float() for name, value in found.constants(HEADS, 0, 2).items()}
    return {**tokens, **learned, **fixed}


def outputs(mixer: str, strategy: str, plan, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """``[1, S, H, V]`` of each."""
    tokens = get_mixer(mixer).tokens(WIDTHS)

    def run():
        core, rank = LinearAttention(strategy, dist.group.WORLD, CHUNK), dist.get_rank()
        found = []
        for batch in batches:
            local = {name: cut(value, plan, rank) if name in tokens else value for name, value in batch.items()}
            found.append(get_mixer(mixer).mix(local, core, plan.handle))
        return found

    ranks = Cluster(plan.world, trace=False).run(run)
    return [unshard(list(parts), plan) for parts in zip(*ranks, strict=True)]


def changed(batch: dict[str, torch.Tensor], mixer: str, token: int) -> dict[str, torch.Tensor]:
    other = {name: value.clone() for name, value in batch.items()}
    for name in get_mixer(mixer).tokens(WIDTHS):
        other[name][:, token] = 3 * torch.randn_like(other[name][:, token])
    return other


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_last_token_of_a_document_changes_nothing_in_the_next(mixer, layout):
    """Documents end at every offset of a chunk, on edges of shards, and after one token."""
    strategy = STRATEGIES[(MIXERS.index(mixer) + len(layout)) % 3]
    lengths = (11, 1, 12, 1, 2, 6, 4, 11)
    documents = Documents.from_lengths(lengths)
    plan = make_plan((documents,), Mask(), LAYOUTS[layout], LENGTH, 3)
    batch, ends = inputs(mixer), documents.cu_seqlens[1:].tolist()
    base, *others = outputs(mixer, strategy, plan, [batch, *(changed(batch, mixer, end - 1) for end in ends)])
    for start, end, other in zip(documents.cu_seqlens.tolist(), ends, others, strict=False):
        assert torch.equal(other[:, end:], base[:, end:])
        assert torch.equal(other[:, :start], base[:, :start])
        assert not torch.equal(other[:, end - 1], base[:, end - 1])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_token_changes_an_earlier_output(mixer, layout, strategy):
    """At every offset of a chunk, across chunks, segments and ranks."""
    plan = make_plan((Documents.single(LENGTH),), Mask(), LAYOUTS[layout], LENGTH, 3)
    batch = inputs(mixer)
    tokens = [*range(1, 18), 23, 24, 31, 32, 40, 47]
    base, *others = outputs(mixer, strategy, plan, [batch, *(changed(batch, mixer, token) for token in tokens)])
    for token, other in zip(tokens, others, strict=True):
        assert torch.equal(other[:, :token], base[:, :token])
        assert not torch.equal(other[:, token:], base[:, token:])
