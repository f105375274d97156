"""Linear + log-probability of one token per row, in chunks: the full logits never exist, on the way back neither.

For losses of sums over a sequence, whose gradient is known only when all of them are: rows are computed twice. The values
are float32 whatever the dtype of the model, because what they are compared with differs from them by very little.

Legend: N scored rows, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapt.losses.linear_cross_entropy import CHUNK


def linear_log_probability(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """[N] log softmax(hidden @ head.T)[target] of each row, fp32 (fp64 for fp64 inputs), differentiable.

    hidden [N, C], head [V, C], target [N] int64. N may be 0.
    """
    return _LinearLogProbability.apply(hidden, head, target)


class _LinearLogProbability(torch.autograd.Function):
    """d log p(target) / d logits = onehot(target) - p, per row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, head, target)
        found = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows in _chunks(hidden):
            logits = _logits(hidden[rows], head)
            at = logits.gather(1, target[rows, None])[:, 0]
            found[rows] = at - logits.logsumexp(1)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        hidden, head, target = ctx.saved_tensors
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_head = torch.zeros(head.shape, dtype=grad.dtype, device=head.device) if wants_head else None
        for rows in _chunks(hidden):
            slope = _logits(hidden[rows], head).softmax(1).neg_()
            slope.scatter_add_(1, target[rows, None], torch.ones_like(slope[:, :1]))
            slope = (slope * grad[rows, None]).to(hidden.dtype)
            if wants_hidden:
                of_hidden[rows] = slope @ head
            if wants_head:
                of_head += (slope.T @ hidden[rows]).to(of_head.dtype)
        return of_hidden, None if of_head is None else of_head.to(head.dtype), None


def _chunks(hidden: Tensor):
    size = CHUNK.get(hidden.device.type, 2048)
    return (slice(start, start + size) for start in range(0, hidden.shape[0], size))


def _logits(rows: Tensor, head: Tensor) -> Tensor:
    """[n, V], fp32 or wider."""
    logits = rows @ head.T.to(rows.dtype)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
