"""Every family on every mesh and strategy is ``transformers``' model: packed documents equal each one alone."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.huggingface.reference.dtype import in_model_dtype
from tests.huggingface.small_models import CASES, SIZES, published, saved
from tests.huggingface.verifying import directory_of, verify

LIMIT = {"float64": 1e-10, "float32": 1e-5}
WAYS = {
    "ring": "attention=ring attention.layout=zigzag",
    "striped": "attention=striped",
    "ulysses": "attention=ulysses",
    "gather": "attention=gather",
    "disaggregated": "attention=disaggregated",
}
MESHES = {
    "one rank": "parallel.sp=1",
    **{f"sp {sp} {way}": f"parallel.sp={sp} {words}" for sp, (way, words) in product((2, 4), WAYS.items())},
    "tp 2 sp 2": "parallel.tp=2 parallel.sp=2",
    "tp 4": "parallel.tp=4",  # more ranks than key heads
    "pp 2 sp 2": "parallel.pp=2 parallel.sp=2 attention=gather",
    "dp 2 sp 2": "parallel.dp_shard=2 parallel.sp=2 attention=burst",
}
HYBRIDS = ("qwen3.5", "olmo hybrid")
# A state travels for every stripe, so stripes are no shorter than the chunks of linear layers.
STRIPES = "attention.layout_block=8 attention.chunk=8"


def sampled() -> list[Any]:
    """All of the product; `make test` takes each family once, meshes and dtypes in turn."""
    meshes, dtypes = list(MESHES), list(LIMIT)
    chosen = {(name, meshes[(3 * n + 1) % len(meshes)], dtypes[n % 2]) for n, name in enumerate(CASES)}
    return [
        pytest.param(*one, marks=() if one in chosen else pytest.mark.matrix) for one in product(CASES, MESHES, LIMIT)
    ]


@pytest.mark.parametrize(("name", "mesh", "dtype"), sampled())
def test_it_is_the_model_of_transformers(
    name: str, mesh: str, dtype: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stripes = STRIPES.split() if name in HYBRIDS and "striped" in mesh else []
    words = ["--documents", "37,1,26,19", "--dtype", dtype, *MESHES[mesh].split(), *stripes]
    status, verdict = verify(capsys, directory_of(name, folder), *words)
    assert status == 0 and verdict["passed"], verdict
    # Of the decays of linear layers transformers itself loses more digits in fp32; the verdict allows for that.
    judged = {one: error for one, error in verdict["errors"].items() if dtype == "float64" or "linear_attn" not in one}
    assert max(judged.values()) < LIMIT[dtype], judged


THETA = {"rope_theta": 10_000.0}
SCALED = {"factor": 4.0, "original_max_position_embeddings": 48}
FACTORS = {"short_factor": [1.0 + 0.1 * n for n in range(6)], "long_factor": [1.0 + 0.7 * n for n in range(6)]}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", **SCALED},
    "yarn, all keys": {
        "rope_type": "yarn", **SCALED, "beta_fast": 8.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn, attention factor": {"rope_type": "yarn", **SCALED, "attention_factor": 1.3},
    "longrope": {"rope_type": "longrope", **SCALED, **FACTORS},
    "longrope, attention factor": {"rope_type": "longrope", **SCALED, **FACTORS, "attention_factor": 0.9},
    "llama3": {"rope_type": "llama3", **SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "abf": {"rope_type": "default", "rope_theta": 8_000_000.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "length", "mesh"),
    [
        pytest.param(*one, marks=() if number % 14 == 1 else pytest.mark.matrix)
        for number, one in enumerate(product(ROPES, (31, 48, 133), ("one rank", "sp 2 ring", "sp 4 striped")))
    ],
)
def test_every_type_of_rope_below_and_above_its_original_length(
    rope: str, length: int, mesh: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables that depend on a length are those of the run's, whatever the lengths of its documents."""
    path = saved("qwen2", tmp_path)
    config = json.loads((path / "config.json").read_text())
    changed = {"rope_parameters": THETA | ROPES[rope], "max_position_embeddings": 48 if rope == "dynamic" else 192}
    (path / "config.json").write_text(json.dumps({**config, **changed}))
    words = ["--documents", f"{length - 12},12", *MESHES[mesh].split()]
    status, verdict = verify(capsys, path, *words)
    assert status == 0 and max(verdict["errors"].values()) < 1e-10, verdict


@pytest.mark.parametrize(
    "words",
    [
        ["model.rope.rope_type=yarn", "model.rope.factor=4", "model.rope.original_max_position_embeddings=64"],
        ["model.rope.rope_type=ntk", "model.rope.factor=3"],
        ["model.rope_theta=123456"],
        ["model.rope.rope_type=dynamic", "model.rope.factor=2", "model.rope.max_position_embeddings=32"],
    ],
)
def test_other_positions_hold_on_both_sides(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = verify(capsys, directory_of("qwen3", folder), "--seq", "80")[1]
    status, verdict = verify(capsys, directory_of("qwen3", folder), "--seq", "80", "parallel.sp=2", *words)
    assert status == 0 and verdict["errors"] != before["errors"], verdict


@pytest.mark.parametrize("name", CASES)
def test_the_patch_is_of_fp32_parts_alone(name: str) -> None:
    """It changes nothing in fp32, and in fp64 only what fp32 rounds away."""
    model = published(name)
    tokens = torch.randint(SIZES["vocab_size"], (1, 70), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = model(tokens).logits
        with in_model_dtype(torch.float32):
            assert torch.equal(model(tokens).logits, plain)
        whole = model.double()
        try:
            rounded = whole(tokens).logits
            with in_model_dtype(torch.float64):
                exact = whole(tokens).logits
        finally:
            model.float()
    assert torch.linalg.vector_norm(exact - plain) < 1e-5 * torch.linalg.vector_norm(exact)
    assert 1e-10 < torch.linalg.vector_norm(exact - rounded) / torch.linalg.vector_norm(exact) < 1e-5
