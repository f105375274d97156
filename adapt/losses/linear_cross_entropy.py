"""Linear + cross-entropy over the rows a loss needs, in chunks: the full logits never exist.

Legend: N scored rows, C hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = {"cpu": 256, "cuda": 2048}
"""Rows whose logits exist at one time, by device. torch's own heuristic takes chunks twice as slow on CPUs."""


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    exclude: int | None = None,
) -> Tensor:
    """Sum over rows of `weight * CE(hidden @ head.T, target)`: scalar, fp32 (fp64 for fp64 inputs).

    hidden [N, C], head [V, C], target [N] int64, weight [N] fp32 or None (all 1). `exclude` is a vocabulary id whose
    logit counts as -inf (the mask token, which no position may predict). N may be 0: the sum is 0, with a graph.
    """
    sum_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if hidden.shape[0] == 0:
        return (hidden.sum() + 0.0 * head[0].sum()).to(sum_dtype)
    bias = None
    if exclude is not None:
        bias = torch.zeros(head.shape[0], dtype=head.dtype, device=head.device)
        bias[exclude] = float("-inf")
    # "sum" computes the gradients on the way forward and forms each logit once, but returns the sum in the input's
    # dtype, too coarse in bf16; "none" recomputes the chunks in the backward pass and lets us weight and add in fp32.
    if weight is None and hidden.dtype in (torch.float32, torch.float64):
        return _chunked(hidden, head, target, bias, "sum").to(sum_dtype)
    losses = _chunked(hidden, head, target, bias, "none").to(sum_dtype)
    return (losses if weight is None else losses * weight).sum()


def token_cross_entropy(hidden: Tensor, head: Tensor, target: Tensor, exclude: int | None = None) -> Tensor:
    """[N] CE of each row, as above, fp32 (fp64 for fp64 inputs); for measuring, without gradients."""
    losses = [
        F.cross_entropy(_excluded(rows @ head.T, exclude), ids, reduction="none")
        for rows, ids in zip(hidden.split(CHUNK["cpu"]), target.split(CHUNK["cpu"]), strict=True)
    ]
    return torch.cat(losses)


def _excluded(logits: Tensor, exclude: int | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if exclude is not None:
        logits[:, exclude] = float("-inf")
    return logits


def _chunked(hidden: Tensor, head: Tensor, target: Tensor, bias: Tensor | None, reduction: str) -> Tensor:
    low = hidden.dtype in (torch.bfloat16, torch.float16)
    options = torch.nn.LinearCrossEntropyOptions(
        chunking_method=None,
        batch_chunk_size=CHUNK.get(hidden.device.type, 2048),
        acc_policy="accurate" if low and hidden.device.type == "cpu" else "compact",
        acc_dtype=torch.float32 if low else None,
    )
    return F.linear_cross_entropy(hidden, head, target, linear_bias=bias, reduction=reduction, options=options)
