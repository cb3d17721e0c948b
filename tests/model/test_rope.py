"""Tables of positions against those of ``transformers``, and what is refused of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config import Config, resolve
from longctx.config.sections.rope import RopeConfig
from longctx.errors import ConfigError
from longctx.model.rotary import apply_rotary, rotation_of
from longctx.rope import TYPES

HEAD_DIM, ORIGINAL, THETA = 32, 64, 10_000.0
PAIRS = HEAD_DIM // 2
SCALED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONG = {"short_factor": tuple(1 + n / 40 for n in range(PAIRS)), "long_factor": tuple(1 + n / 4 for n in range(PAIRS))}
SECTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "default partial": {"partial_rotary_factor": 0.25},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0, "max_position_embeddings": ORIGINAL},
    "yarn": SCALED,
    "yarn everything": {
        **SCALED, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.1, "truncate": False,
    },
    "yarn attention": {**SCALED, "attention_factor": 1.3},
    "longrope": {**LONG, "original_max_position_embeddings": ORIGINAL, "factor": 4.0},
    "longrope by length": {**LONG, "original_max_position_embeddings": ORIGINAL, "max_position_embeddings": 256},
    "llama3": {**SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("length", [ORIGINAL // 2, ORIGINAL, 3 * ORIGINAL])
@pytest.mark.parametrize("case", SECTIONS)
def test_a_table_is_that_of_transformers(case: str, length: int) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = case.split()[0]
    kind = TYPES[name]
    section = RopeConfig(rope_type=name, **SECTIONS[case], length=length if kind.by_length else None)
    section.check("model.rope", HEAD_DIM)
    table = section.table(THETA, HEAD_DIM)
    given_ = {k: list(v) if isinstance(v, tuple) else v for k, v in SECTIONS[case].items()}
    most = given_.pop("max_position_embeddings", ORIGINAL)
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=most,
        rope_parameters={"rope_type": name, "rope_theta": THETA, **given_},
    )  # fmt: skip
    if name == "default":
        expected, factor = 1.0 / THETA ** (np.arange(0, table.rotated, 2) / table.rotated), 1.0
    else:
        found, factor = ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=length)
        expected = found.double().numpy()
    assert table.factor == pytest.approx(factor, rel=1e-6)
    np.testing.assert_allclose(table.frequencies, expected, rtol=2e-5, atol=1e-9)


def test_ntk_is_the_default_with_another_base_and_nope_turns_nothing() -> None:
    ntk = RopeConfig(rope_type="ntk", factor=4.0).table(THETA, HEAD_DIM)
    moved = RopeConfig(rope_theta=THETA * 4.0 ** (HEAD_DIM / (HEAD_DIM - 2))).table(THETA, HEAD_DIM)
    np.testing.assert_allclose(ntk.frequencies, moved.frequencies)
    x = torch.randn(1, 5, 2, HEAD_DIM)
    none = rotation_of(torch.arange(5)[None], RopeConfig(rope_type="none").table(THETA, HEAD_DIM), torch.float32)
    assert apply_rotary(x, none) is x


@settings(max_examples=50, deadline=None)
@given(share=st.sampled_from([0.25, 0.5, 1.0]), shift=st.integers(0, 10**6), factor=st.floats(0.5, 2.0))
def test_what_a_query_reads_depends_on_how_far_a_key_is(share: float, shift: int, factor: float) -> None:
    section = RopeConfig(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=64, partial_rotary_factor=share,
        attention_factor=factor,
    )  # fmt: skip
    q, k = torch.randn(2, 1, 1, 1, HEAD_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = section.table(THETA, HEAD_DIM)

    def product(query: int, key: int) -> float:
        turned = [
            apply_rotary(x, rotation_of(torch.tensor([[place]]), table, torch.float64))
            for x, place in ((q, query), (k, key))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(shift + 7, shift) == pytest.approx(product(7, 0), rel=1e-6, abs=1e-9)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "partial": ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings=null"),
    "unread": ({"factor": 4.0}, r"factor=4\.0 is not read by model\.rope\.rope_type=default"),
    "unknown": ({"rope_type": "yarm"}, "did you mean yarn"),
    "shrinks": ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
    "order": ({"rope_type": "llama3", **SCALED, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "must be below"),
    "count": ({"rope_type": "longrope", **LONG, "long_factor": (1.0,), "original_max_position_embeddings": 64,
               "factor": 2.0}, "has 1 numbers"),
    "no scale": ({"rope_type": "longrope", **LONG, "original_max_position_embeddings": 64}, "longrope scales"),
    "odd": ({"partial_rotary_factor": 0.1}, "must be pairs"),
    "shorter": ({"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 64, "length": 100}, "is longer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_section_that_is_partial_contradictory_or_not_understood_is_refused(case: str) -> None:
    section, words = BAD[case]
    with pytest.raises(ConfigError, match=words):
        Config.from_dict({"model": {"rope": section}})


def test_a_table_by_length_is_made_for_the_run_not_for_what_a_rank_holds() -> None:
    section = {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 64}
    config = Config.from_dict({"model": {"rope": section}, "data": {"seq_len": 512}})
    assert config.model.rope.length is None and resolve(config, 1).model.rope.length == 512
