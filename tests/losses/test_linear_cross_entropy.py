from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapt.losses.linear_cross_entropy import linear_cross_entropy


def reference(hidden, head, target, weight, exclude):
    logits = hidden.double() @ head.double().T
    if exclude is not None:
        logits[:, exclude] = float("-inf")
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses.sum() if weight is None else (losses * weight).sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("exclude", [None, 7])
@pytest.mark.parametrize(
    "dtype, value, gradient",
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 1e-5), (torch.bfloat16, 2e-3, 1e-2)],
)
def test_equals_the_full_logits_in_float64(dtype, value, gradient, exclude, weighted):
    """Chunks, exclusion and weights change memory, not numbers; the tolerances are those of the input's dtype."""
    torch.manual_seed(0)
    hidden = torch.randn(600, 16, dtype=dtype, requires_grad=True)
    head = torch.randn(90, 16, dtype=dtype, requires_grad=True)
    target = torch.randint(8, 90, (600,))
    weight = torch.rand(600) if weighted else None
    ours = linear_cross_entropy(hidden, head, target, weight=weight, exclude=exclude)
    theirs = reference(hidden, head, target, weight, exclude)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(ours.item() - theirs.item()) <= value * theirs.item()
    for a, b in zip(
        torch.autograd.grad(0.3 * ours, (hidden, head)),
        torch.autograd.grad(0.3 * theirs, (hidden, head)),
        strict=True,
    ):
        assert (a.double() - b.double()).norm() <= gradient * b.double().norm()


def test_no_rows_is_zero_with_a_graph():
    head = torch.randn(9, 4, requires_grad=True)
    hidden = torch.randn(0, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long), exclude=3)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(head.grad, torch.zeros_like(head))
