"""The decoder against one written out by hand, in fp64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from longctx.attention import StrategyAttention
from longctx.config import ModelConfig
from longctx.model import Decoder, initialize
from longctx.sequence import Contiguous, Documents, Mask, make_plan

CONFIG = ModelConfig(vocab_size=40, dim=24, layers=2, heads=4, kv_heads=2, head_dim=6, hidden_dim=20, init_std=0.3)
LENGTHS = [9, 1, 7]
LENGTH = sum(LENGTHS)


def naive_logits(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """One sequence of ``LENGTHS``, a document at a time, a head at a time, RoPE by complex numbers."""
    config, weights = model.config, dict(model.named_parameters())
    documents = []
    for document in tokens.split(LENGTHS):
        x = weights["embedding.weight"][document]
        for layer in range(config.layers):
            get = {n.split(".", 2)[2]: w for n, w in weights.items() if n.startswith(f"blocks.{layer}.")}
            x = x + naive_attention(config, get, norm(x, get["attention_norm.weight"], config))
            y = norm(x, get["mlp_norm.weight"], config)
            gate = y @ get["gate.weight"].T
            x = x + (gate * torch.sigmoid(gate) * (y @ get["up.weight"].T)) @ get["mlp_out.weight"].T
        x = norm(x, weights["norm.weight"], config)
        documents.append(x @ weights.get("head.weight", weights["embedding.weight"]).T)
    return torch.cat(documents)


def naive_attention(config, get, x):
    d = config.head_dim
    causal = torch.tril(torch.ones(len(x), len(x), dtype=torch.bool))
    heads = []
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        q = x @ get["q.weight"][head * d : head * d + d].T
        k = x @ get["k.weight"][shared * d : shared * d + d].T
        v = x @ get["v.weight"][shared * d : shared * d + d].T
        if config.qk_norm:
            q, k = norm(q, get["q_norm.weight"], config), norm(k, get["k_norm.weight"], config)
        scores = (turn(q, config) @ turn(k, config).T) / math.sqrt(d)
        heads.append(scores.masked_fill(~causal, -math.inf).softmax(-1) @ v)
    return torch.cat(heads, -1) @ get["attention_out.weight"].T


def turn(x, config):
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-2.0 * torch.arange(half, dtype=torch.float64) / config.head_dim)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


def norm(x, weight, config):
    return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight


def decoder(config: ModelConfig, seed: int = 3) -> Decoder:
    model = Decoder(config, StrategyAttention("local"), loss_chunk=4).double()
    initialize(model, seed)
    with torch.no_grad():  # weights of norms away from 1, so that a forgotten one shows
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def inputs(seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CONFIG.vocab_size, (1, LENGTH), generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    labels = torch.randint(CONFIG.vocab_size, (1, LENGTH), generator=generator)
    labels[0, [8, 9, 16]] = -100
    plan = make_plan((Documents.from_lengths(LENGTHS),), Mask(), Contiguous(), LENGTH, 1)
    return tokens, positions, labels, plan


@pytest.mark.parametrize(
    "fields",
    [{}, {"qk_norm": True}, {"tie_embeddings": False}, {"kv_heads": 1}, {"kv_heads": 4, "qk_norm": True}],
    ids=str,
)
def test_logits_loss_and_gradients_are_those_of_the_naive_decoder(fields):
    model = decoder(replace(CONFIG, **fields))
    tokens, positions, labels, plan = inputs()
    expected = naive_logits(model, tokens[0])
    torch.testing.assert_close(model(tokens, positions, plan.handle)[0], expected, rtol=0, atol=1e-11)

    loss = F.cross_entropy(expected, labels[0], reduction="sum")
    expected_gradients = torch.autograd.grad(loss, list(model.parameters()))
    summed = model(tokens, positions, plan.handle, labels)
    torch.testing.assert_close(summed, loss, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(summed, list(model.parameters()))
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-10)


def test_initial_weights_depend_on_seed_and_name_alone():
    config = replace(CONFIG, init_std=0.02, dim=64, hidden_dim=256)
    one, other = Decoder(config), Decoder(replace(config, layers=1))
    initialize(one, 0)
    initialize(other, 0)
    weights = dict(one.named_parameters())
    for name, weight in other.named_parameters():
        if not name.endswith(("attention_out.weight", "mlp_out.weight")):
            assert torch.equal(weight, weights[name])
    assert not torch.equal(weights["blocks.0.q.weight"], weights["blocks.1.q.weight"])
    assert weights["blocks.0.gate.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["blocks.1.mlp_out.weight"].std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert torch.equal(weights["norm.weight"], torch.ones(64))


def test_rope_is_exact_at_a_million_tokens():
    from longctx.config.sections.rope import RopeConfig
    from longctx.model.rotary import apply_rotary, rotation_of

    position = 999_983
    rotation = rotation_of(torch.tensor([[position]]), RopeConfig().table(10_000.0, 4), torch.float32)
    turned = apply_rotary(torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]]), rotation)[0, 0, 0]
    assert turned[0].item() == pytest.approx(math.cos(position), abs=1e-6)
    assert turned[2].item() == pytest.approx(math.sin(position), abs=1e-6)
