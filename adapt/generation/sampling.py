"""Logits -> candidate tokens and how sure the model is of them.

Legend: R rows, K slots, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling fields every sampler's config has; its config inherits them."""

    temperature: float = 0.0
    """0: the most probable token. Otherwise logits are divided by it and a token is drawn."""
    top_k: int | None = None
    """Draw among this many most probable tokens only; null: all. Without effect at temperature 0."""
    top_p: float | None = None
    """Draw among the fewest most probable tokens whose probabilities sum to this; null: all. Without effect
    at temperature 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more; 0.7 to 1 is usual")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} leaves no token to draw; give 1 or more, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 0.8 to 0.95 is usual")


@dataclass(frozen=True)
class Candidates:
    """One proposed token per slot."""

    tokens: Tensor
    """[R, K] int64."""
    confidence: Tensor
    """[R, K] probability of the proposed token, after temperature, top-k and top-p (at temperature 0: of the
    plain softmax). At least fp32."""
    probabilities: Tensor
    """[R, K, V] what the token was drawn from; rules that look beyond one token (entropy, margin) read it."""


def propose(logits: Tensor, sampling: Sampling, uniform: Tensor | None, forbidden: int | None = None) -> Candidates:
    """logits [R, K, V], uniform [R, K] fp64 in [0, 1) (None at temperature 0); `forbidden` is never
    proposed."""
    logits = allowed(logits, forbidden)
    probabilities = _distribution(logits, sampling)
    # Of the logits: two that differ may have the same probability once rounded.
    tokens = logits.argmax(-1) if sampling.temperature == 0 else draw(probabilities, uniform)
    confidence = probabilities.gather(-1, tokens[..., None])[..., 0]
    return Candidates(tokens, confidence, probabilities)


def distribution(logits: Tensor, sampling: Sampling, forbidden: int | None = None) -> Tensor:
    """logits [R, K, V] -> what tokens are drawn from, [R, K, V]; at temperature 0 the plain softmax. At least fp32."""
    return _distribution(allowed(logits, forbidden), sampling)


def _distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature > 0:
        logits = filtered(logits / sampling.temperature, sampling)
    return logits.softmax(-1)


def allowed(logits: Tensor, forbidden: int | None) -> Tensor:
    """In at least fp32, and minus infinity for the forbidden token."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if forbidden is not None:
        logits = logits.clone()
        logits[..., forbidden] = float("-inf")
    return logits


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Top-k, then top-p of what is left (transformers' order): everything else becomes -inf."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        weakest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1)
        before = mass.cumsum(-1) - mass
        before[..., 0] = 0  # rounding must not cost us the best token
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: [R, K, V] and one uniform number per slot [R, K] -> tokens [R, K].

    The first token whose cumulative mass exceeds u x total: one of probability 0 adds no mass, so it cannot
    be drawn.
    """
    cumulative = probabilities.double().cumsum(-1)
    point = uniform.to(cumulative)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, point, right=True)[..., 0].clamp_(max=probabilities.shape[-1] - 1)
