"""The algebra: scans equal their definition, compose, and differentiate as plain autograd does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.linear.affine import affine_exscan, affine_exscan_adjoint

KINDS = ("number", "diagonal", "matrix")


def drawn(kind: str, count: int, keys: int, values: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Transitions with some document starts, additions, and an initial state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    transitions = {
        "number": lambda: draw(count, 3, 1, 1).sigmoid(),
        "diagonal": lambda: draw(count, 3, keys, 1).sigmoid(),
        "matrix": lambda: draw(count, 3, keys, keys) / keys,
    }[kind]()
    starts = torch.rand(2, count, 1, 1, 1, generator=generator) < 0.25
    return transitions.masked_fill(starts, 0), draw(count, 3, keys, values), draw(1, 3, keys, values)


def dense(transitions: torch.Tensor, keys: int) -> torch.Tensor:
    if transitions.shape[-2:] == (keys, keys):
        return transitions
    return torch.diag_embed(transitions.expand(*transitions.shape[:-2], keys, 1).squeeze(-1))


def by_definition(transitions, additions, initial):
    """Every element's entering state from the composition of all before it, not from the state before."""
    count, keys = additions.shape[1], additions.shape[3]
    maps = dense(transitions, keys)
    entering = []
    for n in range(count + 1):
        total, product = torch.zeros_like(initial[:, 0]), torch.eye(keys, dtype=torch.float64)
        for m in range(n - 1, -1, -1):
            total = total + product @ additions[:, m]
            product = product @ maps[:, m]
        entering.append(total + product @ initial[:, 0])
    return torch.stack(entering, 1)


@pytest.mark.parametrize("kind", KINDS)
@given(count=st.integers(0, 6), keys=st.integers(1, 4), values=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_a_scan_is_the_composition_of_its_maps(kind, count, keys, values, seed):
    transitions, additions, initial = drawn(kind, count, keys, values, seed)
    entering, leaving = affine_exscan(transitions, additions, initial)
    right = by_definition(transitions, additions, initial)
    torch.testing.assert_close(torch.cat([entering, leaving], 1), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(count=st.integers(1, 6), keys=st.integers(1, 4), seed=st.integers(0, 2**20), data=st.data())
def test_scans_of_two_halves_meet(kind, count, keys, seed, data):
    """Also as two runs of one scan, each from a state of its own."""
    transitions, additions, initial = drawn(kind, count, keys, 2, seed)
    cut = data.draw(st.integers(0, count))
    entering, leaving = affine_exscan(transitions, additions, initial)
    first, middle = affine_exscan(transitions[:, :cut], additions[:, :cut], initial)
    second, end = affine_exscan(transitions[:, cut:], additions[:, cut:], middle)
    assert torch.equal(torch.cat([first, second], 1), entering) and torch.equal(end, leaving)
    runs = affine_exscan(transitions, additions, torch.cat([initial, middle], 1), ((0, cut), (cut, count)))
    assert torch.equal(runs[0], entering) and torch.equal(runs[1], torch.cat([middle, leaving], 1))


@pytest.mark.parametrize("kind", KINDS)
@given(count=st.integers(1, 5), keys=st.integers(1, 4), values=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_gradients_are_those_of_the_definition(kind, count, keys, values, seed):
    tensors = [tensor.requires_grad_() for tensor in drawn(kind, count, keys, values, seed)]
    entering, leaving = affine_exscan(*tensors)
    right = by_definition(*tensors)
    upstream = torch.randn_like(right)
    mine = torch.autograd.grad((entering, leaving), tensors, (upstream[:, :-1], upstream[:, -1:]))
    for got, expected in zip(mine, torch.autograd.grad(right, tensors, upstream), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    adjoint = affine_exscan_adjoint(tensors[0].detach(), upstream[:, :-1], upstream[:, -1:])
    for got, expected in zip(adjoint, mine[1:], strict=True):
        assert torch.equal(got, expected)
