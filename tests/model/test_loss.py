"""Cross-entropy in chunks against torch's own over all logits."""

import pytest
import torch
import torch.nn.functional as F

from longctx.model import cross_entropy_sum

N, DIM, VOCABULARY = 23, 12, 31


def case(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (N,), generator=generator)
    labels[[0, 5, 22]] = -100
    labels[8:16] = -100  # whole chunks
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 4, 7, N, 1000])
@pytest.mark.parametrize("upstream", [1.0, -0.37])
def test_loss_and_gradients_for_any_chunk_and_upstream_gradient(chunk, upstream):
    hidden, weight, labels = case()
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    right = torch.autograd.grad(expected * upstream, (hidden, weight))
    loss = cross_entropy_sum(hidden, weight, labels, chunk)
    found = torch.autograd.grad(loss * upstream, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for gradient, reference in zip(found, right, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert cross_entropy_sum(hidden, weight, labels, chunk) == loss


def test_weight_tied_to_the_input_gets_both_gradients():
    _, weight, labels = case()
    tokens = torch.arange(N) % VOCABULARY
    expected = torch.autograd.grad(F.cross_entropy(weight[tokens].tanh() @ weight.T, labels, reduction="sum"), weight)
    found = torch.autograd.grad(cross_entropy_sum(weight[tokens].tanh(), weight, labels, 5), weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_nothing_valid_is_zero_even_where_hidden_states_are_not_finite():
    hidden, weight, labels = case()
    labels = torch.full_like(labels, -100)
    with torch.no_grad():
        hidden[3] = torch.inf
    loss = cross_entropy_sum(hidden, weight, labels, 6)
    assert loss == 0.0
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(dhidden, torch.zeros_like(dhidden))


def test_bfloat16_sums_in_fp32():
    hidden, weight, labels = case(torch.bfloat16)
    loss = cross_entropy_sum(hidden, weight, labels, 4)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    loss_dtype = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    right = torch.autograd.grad(F.cross_entropy(loss_dtype[0] @ loss_dtype[1].T, labels, reduction="sum"), loss_dtype)
    for gradient, reference in zip(gradients, right, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - reference).norm() <= 2e-2 * reference.norm()


def test_no_tensor_of_all_logits_exists():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in tensors)])
            return out

    hidden, weight, labels = case()
    with Largest() as largest:
        cross_entropy_sum(hidden, weight, labels, 4).backward()
    assert largest.numel <= VOCABULARY * DIM  # the head's gradient; all logits would be N * VOCABULARY


def test_a_graph_that_is_kept_can_be_gone_over_twice():
    """Gradients are scaled in place only where nobody comes after."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(9, (11,), generator=generator)
    loss = cross_entropy_sum(hidden, weight, labels, 4) * 0.25
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum") * 0.25
    for found, again, right in zip(first, second, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert torch.equal(found, again)
        torch.testing.assert_close(found, right)
