"""Models of ``transformers`` under a sequence group equal themselves on one process."""

import copy
import gc
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from longctx.attention import StrategyOptions
from longctx.catalog import STRATEGIES
from longctx.errors import DataError
from longctx.integrations.transformers import register
from longctx.sequence.plan import known_plan
from longctx.sim import Cluster
from tests.huggingface.small_models import SIZES, published
from tests.integrations.transformers_cases import apart, gradients_of, model_of, shared, whole

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

FAMILIES = ("llama", "llama tied", "mistral", "qwen2", "qwen3", "olmo2", "olmo3", "gemma3")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def batch(lengths, rows=1, seed=0):
    """Tokens of documents of these lengths, their labels with no document's first token, and their positions."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 96, (rows, sum(lengths)), generator=generator)
    labels, positions = tokens.clone(), torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    labels[positions == 0] = -100
    return tokens, labels, positions


MESHES = [(2, "ring", "zigzag"), (4, "ring", "striped"), (2, "ulysses", "contiguous"), (4, "gather", "zigzag")]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_packed_and_windowed(name, dtype):
    """Documents shorter and longer than windows, one token long, cut anywhere; the case chooses a mesh."""
    world, strategy, layout = MESHES[(FAMILIES.index(name) + (dtype is torch.float64)) % len(MESHES)]
    tokens, labels, positions = batch((23, 1, 37))
    wanted = whole(name, dtype, tokens, labels=labels, position_ids=positions)
    # Tokens alone are their own labels; a document's first is no target of ours in either case.
    given = {"position_ids": positions} if dtype is torch.float32 else {"labels": tokens, "documents": [23, 1, 37]}
    found = shared(name, dtype, world, strategy, layout, tokens, **given)
    errors = apart(found, wanted)
    assert max(errors.values()) < TOLERANCE[dtype], errors


CROSS = [("ring", "zigzag"), ("ring", "striped"), ("ulysses", "contiguous")]


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("lengths", [(61,), (23, 1, 37)], ids=["one document", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_on_every_mesh(name, lengths, dtype):
    tokens, labels, positions = batch(lengths)
    wanted = whole(name, dtype, tokens, labels=labels, position_ids=positions)
    for world, (strategy, layout) in itertools.product((2, 4), CROSS):
        given = {"labels": labels, "position_ids": positions}
        errors = apart(shared(name, dtype, world, strategy, layout, tokens, **given), wanted)
        assert max(errors.values()) < TOLERANCE[dtype], (world, strategy, layout, errors)


def test_one_long_document_of_several_rows():
    tokens, labels, _ = batch((53,), rows=2)
    wanted = whole("mistral", torch.float64, tokens, labels=labels)
    found = shared("mistral", torch.float64, 4, "ring", "zigzag", tokens)
    errors = apart(found, wanted)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize(
    "strategy", [name for name in STRATEGIES if name not in ("local", "ring", "gather", "ulysses")]
)
def test_every_strategy(strategy):
    """Windows of 13 in sequences of 61 tokens, packed; rsa has neither."""
    name, lengths, layout = ("mistral", (20, 41), "striped" if strategy == "striped" else "zigzag")
    if strategy == "rsa":
        name, lengths, layout = ("llama", (61,), "contiguous")
    tokens, labels, positions = batch(lengths)
    options = StrategyOptions(ulysses_degree=2) if strategy == "usp" else StrategyOptions()
    wanted = whole(name, torch.float64, tokens, labels=labels, position_ids=positions)
    given = {"labels": labels, "position_ids": positions}
    found = shared(name, torch.float64, 4, strategy, layout, tokens, options, **given)
    errors = apart(found, wanted)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("ends", [(0, 17), (9, 30), (9, 17), (0, 0)], ids=str)
def test_padding_at_either_end(ends):
    """Every token that is no padding has the logits that it has with transformers' mask; its positions too."""
    tokens, labels, _ = batch((30,), rows=2)
    mask = torch.ones_like(tokens)
    mask[1] = 0
    mask[1, ends[0] : ends[1]] = 1
    labels[mask == 0] = -100
    labels[1, ends[0]] = -100
    wanted = whole("olmo3", torch.float64, tokens, labels=labels, attention_mask=mask)
    found = shared("olmo3", torch.float64, 3, "ring", "zigzag", tokens, labels=labels, attention_mask=mask)
    errors = apart(found, wanted, mask.bool())
    assert max(errors.values()) < 1e-10, errors


def test_more_ranks_than_tokens():
    tokens, labels, _ = batch((3,))
    wanted = whole("qwen3", torch.float64, tokens, labels=labels)
    errors = apart(shared("qwen3", torch.float64, 4, "ring", "contiguous", tokens), wanted)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_table_by_length_is_that_of_the_declared_one(kind):
    """Sequences beyond the original length: a rank that holds early tokens alone would take another table."""
    own = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        own |= {"short_factor": [1.0] * 6, "long_factor": [3.0] * 6, "original_max_position_embeddings": 32}
    sizes = {**SIZES, "max_position_embeddings": 32, "rope_parameters": own}
    tokens, _, _ = batch((64,))

    def made(attention):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))
        model.set_attn_implementation(attention)
        return model

    wanted = made("eager")(tokens, use_cache=False).logits

    def rank():
        sequence = register(dist.group.WORLD, "ring", "contiguous")
        model = made("eager")
        sequence.adopt(model, length=64)
        cut = sequence.shard(tokens)
        with pytest.raises(DataError, match="position 127 is beyond the declared length 64"):
            sequence.shard(torch.cat([tokens, tokens], 1))
        return model(**cut.inputs).logits

    found = torch.cat(Cluster(2, trace=False).run(rank), 1)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_recompute_and_a_batch_that_is_let_go():
    """A trainer drops its batch before backward; transformers' own checkpointing runs attention there again."""
    tokens, labels, positions = batch((23, 20))
    wanted = whole("gemma3", torch.float32, tokens, labels=labels, position_ids=positions)

    def rank(recompute):
        sequence = register(dist.group.WORLD)
        model = model_of("gemma3", torch.float32, "longctx")
        sequence.adopt(model)
        if recompute:
            model.gradient_checkpointing_enable()
        cut = sequence.shard(tokens, labels, positions)
        loss = sequence.loss(model(**cut.inputs).logits, cut)
        del cut
        known_plan.cache_clear()  # which keeps the latest plans of a run
        gc.collect()
        loss.backward()
        sequence.sum_gradients(model)
        return gradients_of(model)

    for recompute in (False, True):
        for found in Cluster(2, trace=False).run(rank, recompute):
            for name, gradient in wanted.gradients.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_that_are_averaged_over_data_parallel_ranks_and_accumulated():
    """Two groups of two ranks with different numbers of labels, two microbatches: as DDP averages over all four."""
    batches = [[batch((9, 20), seed=1), batch((29,), seed=2)], [batch((4, 5), seed=3), batch((1, 8), seed=4)]]
    model = model_of("llama", torch.float64, "sdpa")
    total = torch.zeros((), dtype=torch.float64)
    count = sum(int((labels[:, 1:] != -100).sum()) for group in batches for _, labels, _ in group)
    for group in batches:
        for tokens, labels, positions in group:
            logits = model(tokens, position_ids=positions, use_cache=False).logits
            total += F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") / count
    total.backward()
    wanted = gradients_of(model)

    def rank():
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
        sequence = register(mesh["sp"])
        own = copy.deepcopy(published("llama")).double()
        sequence.adopt(own)
        losses = []
        for tokens, labels, positions in batches[mesh["dp"].get_local_rank()]:
            cut = sequence.shard(tokens, labels, positions)
            loss = sequence.loss(own(**cut.inputs).logits, cut, averaged_over=dist.group.WORLD, count=count)
            loss.backward()
            losses.append(loss.detach())
        for parameter in own.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 4
        return sum(losses), gradients_of(own)

    for loss, gradients in Cluster(4, trace=False).run(rank):
        torch.testing.assert_close(loss, total.detach(), rtol=1e-6, atol=0)
        for name, gradient in wanted.items():
            # Both have transformers' own fp32 parts.
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6)
