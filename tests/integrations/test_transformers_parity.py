"""Models of ``transformers`` under a sequence group equal themselves on one process."""

import pytest
import torch

from tests.integrations.transformers_cases import apart, shared, whole

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
    """Documents shorter and longer than windows, one token long, cut by ranks anywhere; ids of the case choose a mesh."""
    world, strategy, layout = MESHES[(FAMILIES.index(name) + (dtype is torch.float64)) % len(MESHES)]
    tokens, labels, positions = batch((23, 1, 37))
    wanted = whole(name, dtype, tokens, labels=labels, position_ids=positions)
    found = shared(name, dtype, world, strategy, layout, tokens, labels=labels, position_ids=positions)
    errors = apart(found, wanted)
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_one_long_document_of_several_rows():
    tokens, labels, _ = batch((53,), rows=2)
    wanted = whole("mistral", torch.float64, tokens, labels=labels)
    found = shared("mistral", torch.float64, 4, "ring", "zigzag", tokens)
    errors = apart(found, wanted)
    assert max(errors.values()) < 1e-10, errors
