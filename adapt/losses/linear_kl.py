"""Linear + KL divergence from a teacher's next-token distribution, in chunks of rows: no full logits on either side.

Legend: N scored rows, C and D hidden sizes of student and teacher, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapt.losses.linear_cross_entropy import CHUNK


def linear_kl(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    weight: Tensor | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """Sum over rows of `weight * KL(teacher || student)`: scalar, fp32 (fp64 for fp64 inputs).

    hidden [N, C], head [V, C]; teacher_hidden [N, D], teacher_head [V', D]; weight [N] fp32 or None (all 1). Both
    distributions are taken over the first `vocabulary` tokens, by default those that both heads have: a conversion may
    have added rows to the student's. Gradients go to `hidden` and `head` only, and are formed on the way forward, so
    that the logits of a row exist once. N may be 0: the sum is 0, with a graph.
    """
    common = min(len(head), len(teacher_head)) if vocabulary is None else vocabulary
    if not 0 < common <= min(len(head), len(teacher_head)):
        raise ValueError(f"vocabulary={common}, but the heads have {len(head)} and {len(teacher_head)} rows")
    if hidden.shape[0] == 0:
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        return (hidden.sum() + 0.0 * head[0].sum()).to(sum_dtype)
    return _LinearKl.apply(hidden, head, teacher_hidden.detach(), teacher_head.detach(), weight, common)


@torch.no_grad()
def token_kl(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, vocabulary: int | None = None
) -> Tensor:
    """[N] KL(teacher || student) of each row, as above; for measuring."""
    common = min(len(head), len(teacher_head)) if vocabulary is None else vocabulary
    size = CHUNK.get(hidden.device.type, 2048)
    parts = [
        _divergence(_log_probabilities(s, head[:common]), _log_probabilities(t, teacher_head[:common]))
        for s, t in zip(hidden.split(size), teacher_hidden.split(size), strict=True)
    ]
    return torch.cat(parts)


class _LinearKl(torch.autograd.Function):
    """d KL / d student logits = p_student - p_teacher, per row."""

    @staticmethod
    def forward(ctx: Any, hidden, head, teacher_hidden, teacher_head, weight, common: int) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros(head.shape, dtype=dtype, device=head.device) if wants_head else None
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        size = CHUNK.get(hidden.device.type, 2048)
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            student = _log_probabilities(hidden[rows], head[:common])
            teacher = _log_probabilities(teacher_hidden[rows], teacher_head[:common])
            values = _divergence(student, teacher)
            factor = None if weight is None else weight[rows].to(dtype)
            total += values.sum() if factor is None else (values * factor).sum()
            if not (wants_hidden or wants_head):
                continue
            slope = student.exp_().sub_(teacher.exp_())
            if factor is not None:
                slope *= factor[:, None]
            slope = slope.to(hidden.dtype)
            if wants_hidden:
                grad_hidden[rows] = slope @ head[:common]
            if wants_head:
                grad_head[:common] += (slope.T @ hidden[rows]).to(dtype)
        ctx.grads = (grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        of_hidden, of_head = (None if g is None else g * grad.to(g.dtype) for g in ctx.grads)
        return of_hidden, of_head, None, None, None, None


def _log_probabilities(rows: Tensor, head: Tensor) -> Tensor:
    """[n, V], fp32 or wider."""
    logits = rows @ head.T.to(rows.dtype)
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """[n] sum over the vocabulary of p_teacher (log p_teacher - log p_student)."""
    student, teacher = student.to(dtype := torch.promote_types(student.dtype, teacher.dtype)), teacher.to(dtype)
    return (teacher.exp() * (teacher - student)).sum(-1)
