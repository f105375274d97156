from __future__ import annotations

import pytest
import torch

from adapt.losses.linear_kl import linear_kl, token_kl


def rows(dtype=torch.float64, extra=0, seed=0):
    """Student [600, 16] with 90 + extra tokens, teacher [600, 24] with 90."""
    torch.manual_seed(seed)
    hidden, head = torch.randn(600, 16), 0.5 * torch.randn(90 + extra, 16)
    teacher, teacher_head = torch.randn(600, 24), 0.4 * torch.randn(90, 24)
    hidden, head, teacher, teacher_head = (x.to(dtype) for x in (hidden, head, teacher, teacher_head))
    return hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head


def reference(hidden, head, teacher, teacher_head, weight, common):
    student = (hidden.double() @ head[:common].double().T).log_softmax(-1)
    target = (teacher.double() @ teacher_head[:common].double().T).log_softmax(-1)
    values = (target.exp() * (target - student)).sum(-1)
    return values.sum() if weight is None else (values * weight).sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("extra, common", [(0, None), (3, None), (3, 70)])
@pytest.mark.parametrize(
    "dtype, value, gradient",
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 1e-5), (torch.bfloat16, 5e-3, 2e-2)],
)
def test_equals_the_full_logits_in_float64(dtype, value, gradient, extra, common, weighted):
    """Value and gradients, over the common vocabulary; rows beyond it get no gradient."""
    hidden, head, teacher, teacher_head = rows(dtype, extra)
    weight = torch.rand(600) if weighted else None
    ours = linear_kl(hidden, head, teacher, teacher_head, weight=weight, vocabulary=common)
    theirs = reference(hidden, head, teacher, teacher_head, weight, common or 90)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(ours.item() - theirs.item()) <= value * theirs.item()
    found = torch.autograd.grad(0.3 * ours, (hidden, head))
    expected = torch.autograd.grad(0.3 * theirs, (hidden, head))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b.double()).norm() <= gradient * b.double().norm()
    assert not found[1][common or 90 :].any()


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    inputs = (torch.randn(5, 3, dtype=torch.double), torch.randn(7, 3, dtype=torch.double))
    teacher, teacher_head = torch.randn(5, 4, dtype=torch.double), torch.randn(7, 4, dtype=torch.double)
    weight = torch.rand(5, dtype=torch.double)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda h, w: linear_kl(h, w, teacher, teacher_head, weight=weight), inputs)


def test_a_student_that_is_its_teacher_has_none():
    hidden, head, *_ = rows()
    kl = linear_kl(hidden, head, hidden, head)
    kl.backward()
    assert kl.item() == 0.0
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_nothing_flows_into_the_teacher():
    hidden, head, teacher, teacher_head = rows()
    teacher.requires_grad_(), teacher_head.requires_grad_()
    linear_kl(hidden, head, teacher, teacher_head).backward()
    assert teacher.grad is None
    assert teacher_head.grad is None


def test_per_row_values_add_up():
    inputs = rows()
    assert token_kl(*inputs).shape == (600,)
    assert token_kl(*inputs).sum().item() == pytest.approx(linear_kl(*inputs).item(), rel=1e-12)
    assert (token_kl(*inputs) >= 0).all()


def test_no_rows_is_zero_with_a_graph():
    head, hidden = torch.randn(9, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    loss = linear_kl(hidden, head, torch.randn(0, 4), torch.randn(9, 4))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(head.grad, torch.zeros_like(head))


def test_logits_of_all_rows_never_exist_at_once(monkeypatch):
    from adapt.losses import linear_kl as module

    seen = []
    original = module._log_probabilities
    monkeypatch.setattr(module, "_log_probabilities", lambda r, h: seen.append(len(r)) or original(r, h))
    linear_kl(*rows())
    assert max(seen) == 256 < 600


@pytest.mark.parametrize("size", [1, 7, 599, 4096])
def test_the_size_of_a_chunk_changes_neither_value_nor_gradient(size, monkeypatch):
    from adapt.losses import linear_kl as module

    inputs = rows()

    def run():
        value = linear_kl(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs[:2])

    usual = run()
    monkeypatch.setitem(module.CHUNK, "cpu", size)
    for a, b in zip(run(), usual, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_vocabulary_that_one_head_lacks_is_an_error():
    with pytest.raises(ValueError, match="vocabulary=91"):
        linear_kl(*rows(extra=3), vocabulary=91)
