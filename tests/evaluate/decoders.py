"""Small decoders with random weights, and one that forgets everything and starts afresh at each token."""

import torch

from longctx.attention import dense_attention
from longctx.attention.core import Started
from longctx.config import ModelConfig
from longctx.evaluate import Generated
from longctx.model import Decoder, initialize
from longctx.sequence import Documents, Mask

MODEL = ModelConfig(vocab_size=40, dim=24, layers=2, heads=4, kv_heads=2, head_dim=6, hidden_dim=20, init_std=0.3)
NEW = 5
TOLERANCE = 1e-10


class Dense:
    """Attention by its definition over one whole sequence."""

    def __init__(self, mask: Mask) -> None:
        self._mask = mask

    def start(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: torch.Tensor) -> Started:
        return Started(dense_attention(q, k, v, [Documents.single(q.shape[1])] * len(q), self._mask))

    def finish(self, started: Started) -> torch.Tensor:
        return started.out


def model_of(config: ModelConfig = MODEL, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(config).to(dtype)
    initialize(model, 1)
    return model


def prompt(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def forgetful(tokens: torch.Tensor, count: int, mask: Mask = Mask(), config: ModelConfig = MODEL) -> Generated:  # noqa: B008
    model, logits = model_of(config), []
    model.set_attention(Dense(mask))
    for _ in range(count):
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        logits.append(model(tokens, positions, torch.tensor(-1))[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1)[:, None]], dim=1)
    return Generated(tokens, torch.stack(logits, dim=1))
