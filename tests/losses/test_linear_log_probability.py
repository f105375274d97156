from __future__ import annotations

import pytest
import torch

from adapt.losses.linear_log_probability import linear_log_probability


def rows(dtype, count=600):
    torch.manual_seed(0)
    hidden, head = torch.randn(count, 16).to(dtype), (0.5 * torch.randn(90, 16)).to(dtype)
    return hidden.requires_grad_(), head.requires_grad_(), torch.randint(0, 90, (count,))


@pytest.mark.parametrize(
    "dtype, value, gradient",
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-2, 2e-2)],
)
def test_equals_the_full_logits_in_float64(dtype, value, gradient):
    """Values of each row, never coarser than float32, and the gradients of sums of any weights."""
    hidden, head, target = rows(dtype)
    ours = linear_log_probability(hidden, head, target)
    theirs = (hidden.double() @ head.double().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (ours.double() - theirs).norm() <= value * theirs.norm()
    weight = torch.randn(600, dtype=torch.float64)
    found = torch.autograd.grad((ours * weight.to(ours.dtype)).sum(), (hidden, head))
    expected = torch.autograd.grad((theirs * weight).sum(), (hidden, head))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b.double()).norm() <= gradient * b.double().norm()


def test_the_gradient_is_that_of_finite_differences():
    hidden, head, target = rows(torch.float64, 5)
    assert torch.autograd.gradcheck(lambda h, w: linear_log_probability(h, w, target), (hidden, head))


def test_no_rows_are_no_values_with_a_graph():
    hidden, head, target = rows(torch.float32, 0)
    found = linear_log_probability(hidden, head, target)
    found.sum().backward()
    assert found.shape == (0,)
    assert not head.grad.any()


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch):
    """Forward and backward form logits of 64 rows at a time, each twice."""
    from adapt.losses import linear_log_probability as module

    monkeypatch.setitem(module.CHUNK, "cpu", 64)
    seen, original = [], module._logits
    monkeypatch.setattr(module, "_logits", lambda r, h: seen.append(len(r)) or original(r, h))
    hidden, head, target = rows(torch.float32)
    linear_log_probability(hidden, head, target).sum().backward()
    assert max(seen) == 64
    assert sum(seen) == 2 * 600
