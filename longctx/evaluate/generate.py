"""Generates text: a sequence-parallel strategy computes the prompt, tree decoding computes each further token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.comm import broadcast, group_of
from longctx.errors import ConfigError
from longctx.evaluate.session import DecodingSession, SequenceSharding
from longctx.model import Decoder


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    ``temperature`` 0 takes the likeliest; ``top_k``: only among so many likeliest ones. ``seed``: of a generator that
    all ranks draw from alike. ``eos``: the token that ends a sequence, None for none.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    eos: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature {self.temperature} must be at least 0; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k} must be at least 1; use None for no limit")


GREEDY = Sampling()
UNSHARDED = SequenceSharding()


@dataclass(frozen=True)
class Generated:
    """Prompts with what was generated after them.

    ``tokens``: int64 ``[B, S + n]``; after its ``eos`` a sequence repeats it. ``logits``: those that each new token was
    chosen from, ``[B, n, V]`` on the CPU, where they were asked for.
    """

    tokens: Tensor
    logits: Tensor | None = None


@torch.no_grad()
def generate(
    model: Decoder,
    tokens: Tensor,
    max_new_tokens: int,
    sharding: SequenceSharding = UNSHARDED,
    sampling: Sampling = GREEDY,
    keep_logits: bool = False,
) -> Generated:
    """Continues the prompts ``tokens``, int64 ``[B, S]``, which have one length and are whole on every rank.

    It ends after ``max_new_tokens``, or when every sequence has its ``eos``. All ranks return the same.
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens {max_new_tokens} must be at least 0")
    generator = torch.Generator().manual_seed(sampling.seed)
    group, prompts = group_of(sharding.group), tokens
    chosen: list[Tensor] = []
    kept_logits: list[Tensor] = []
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    with DecodingSession(model, sharding) as session:
        while len(chosen) < max_new_tokens and not bool(ended.all()):
            logits = session.decode(chosen[-1][:, None])[:, -1] if chosen else session.prefill(prompts)
            following = sample_tokens(logits.cpu(), sampling, generator)
            if sampling.eos is not None:
                following = following.masked_fill(ended, sampling.eos)
            # Logits of all ranks are the same but for the rounding of their devices, which may decide a near tie.
            agreed = broadcast(group, following.to(logits.device), 0).cpu()
            chosen.append(agreed)
            if sampling.eos is not None:
                ended |= agreed == sampling.eos
            if keep_logits:
                kept_logits.append(logits.cpu())
    new = [token[:, None].to(tokens.device) for token in chosen]
    return Generated(torch.cat([tokens, *new], dim=1), torch.stack(kept_logits, dim=1) if kept_logits else None)


def sample_tokens(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Chooses one token, int64 ``[B]``, for each row of logits ``[B, V]``."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    count = logits.shape[-1] if sampling.top_k is None else min(sampling.top_k, logits.shape[-1])
    likeliest, names = logits.double().topk(count, dim=-1)
    drawn = torch.multinomial(torch.softmax(likeliest / sampling.temperature, dim=-1), 1, generator=generator)
    return names.gather(-1, drawn)[:, 0]
