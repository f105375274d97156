"""Gated linear attention: one recurrence, in the forms that need it.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t'        o_t = q_t' S_t

over keys with a decay for each channel (Yang et al. 2024, GLA) or for each head (Mamba-2's and simple GLA's). Nothing
here normalises, scales or masks queries: the mixers do. All forms compute in float32, or in float64 for such inputs.

Legend: B rows, H heads, T tokens, K key channels, V value channels, C tokens of a chunk, N chunks. q, k [B, H, T, K],
v [B, H, T, V], g [B, H, T, K] or [B, H, T, 1] log decay (at most 0), state [B, H, K, V]; segments [B, T], see tokens.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SUB = 16
"""Tokens whose decays are compared one by one in the exact form."""
REACH = 80.0
"""Largest sum of |g| over a chunk of the fast form: exp(80) is a number in float32, exp(89) is not."""


def floor(chunk: int) -> float:
    """The log decay below which the fast form cannot go: exp(-1.25) a token for chunks of 64."""
    return -REACH / chunk


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, segments: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, in time and memory T^2 K: for tests, in float64. -> o [B, H, T, V], state."""
    q, k, v, g = _widened(q, k, v, g)
    b = g.cumsum(2)
    apart = b[:, :, :, None] - b[:, :, None]  # [B, H, T, T, K]
    seen = _seen(segments, q.shape[2], q.device)
    decay = torch.where(seen[..., None], apart, -torch.inf).exp()
    scores = (q[:, :, :, None] * k[:, :, None] * decay).sum(-1)
    out = scores @ v
    write = k * (b[:, :, -1:] - b).exp()
    if segments is not None:
        write = write * (segments == segments[:, -1:])[:, None, :, None]
    last = write.transpose(2, 3) @ v
    if state is not None:
        alive = 1.0 if segments is None else (segments == segments[:, :1])[:, None, :, None].to(q.dtype)
        out = out + (q * b.exp() * alive) @ state
        kept = 1.0 if segments is None else (segments[:, -1] == segments[:, 0])[:, None, None, None].to(q.dtype)
        last = last + b[:, :, -1, :, None].exp() * state * kept
    return out, last


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, segments: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token: decoding, and the second opinion of every test."""
    q, k, v, g = _widened(q, k, v, g)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state.to(q.dtype)
    decay, out = g.exp(), []
    for t in range(q.shape[2]):
        if segments is not None and t:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(out, 2), state


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    segments: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Chunks by matrix products, states from chunk to chunk: time T (C + K) V (Yang et al. 2024, section 4).

    `exact` holds for any decay. The fast form needs g >= floor(chunk), which the caller sees to. One decay for each
    head is exact in both.
    """
    q, k, v, g = _widened(q, k, v, g)
    length = q.shape[2]
    size = min(chunk, -(-length // SUB) * SUB)
    padding = -length % size
    if padding:  # tokens that write nothing and keep the state
        q, k, v, g = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v, g))
        if segments is not None:
            segments = torch.cat([segments, segments[:, -1:].expand(-1, padding)], 1)
    q, k, v, g = (x.unflatten(2, (-1, size)) for x in (q, k, v, g))  # [B, H, N, C, *]
    b = g.cumsum(3)
    total = b[..., -1:, :]
    read, write, decay = q * b.exp(), k * (total - b).exp(), total.exp().transpose(3, 4)
    if segments is not None:
        inside = segments.unflatten(1, (-1, size))  # [B, N, C]
        last = inside[..., -1:]
        before = torch.cat([inside[:, :1, :1], last[:, :-1]], 1)  # of the token before the chunk
        read = read * (inside == before)[:, None, ..., None]
        write = write * (inside == last)[:, None, ..., None]
        decay = decay * (last == before)[:, None, ..., None]
        segments = inside
    seen = _seen(segments, size, q.device)
    out = torch.where(seen, _scores(q, k, g, b, exact), 0.0) @ v
    added = write.transpose(3, 4) @ v  # [B, H, N, K, V]
    state = torch.zeros_like(added[:, :, 0]) if state is None else state.to(q.dtype)
    entering = []
    for n in range(q.shape[2]):
        entering.append(state)
        state = decay[:, :, n] * state + added[:, :, n]
    out = out + read @ torch.stack(entering, 2)
    return out.flatten(2, 3)[:, :, :length], state


def _scores(q: Tensor, k: Tensor, g: Tensor, b: Tensor, exact: bool) -> Tensor:
    """sum_c q_ic k_jc exp(b_ic - b_jc) within a chunk [..., C, C]; finite, and right where j <= i."""
    if g.shape[-1] == 1:
        return (q @ k.transpose(-1, -2)) * _sums_between(g[..., 0]).exp()
    if not exact:
        return (q * b.exp()) @ (k * (-b).exp()).transpose(-1, -2)
    rows = []
    for start in range(0, q.shape[-2], SUB):
        stop = start + SUB
        mine = slice(start, stop)
        near = b[..., mine, None, :] - b[..., None, mine, :]
        earlier = torch.ones(SUB, SUB, dtype=torch.bool, device=q.device).tril()[:, :, None]
        near = torch.where(earlier, near, -torch.inf).exp()  # [..., SUB, SUB, K]
        parts = [torch.einsum("...ic,...jc,...ijc->...ij", q[..., mine, :], k[..., mine, :], near)]
        if start:  # both factors are at most 1, whatever the decay: the anchor lies between the two tokens
            anchor = b[..., start - 1 : start, :]
            left = q[..., mine, :] * (b[..., mine, :] - anchor).exp()
            parts.insert(0, left @ (k[..., :start, :] * (anchor - b[..., :start, :]).exp()).transpose(-1, -2))
        row = torch.cat(parts, -1)
        rows.append(F.pad(row, (0, q.shape[-2] - row.shape[-1])))
    return torch.cat(rows, -2)


def _sums_between(g: Tensor) -> Tensor:
    """g [..., C] -> [..., C, C]: the sum over j < t <= i of g_t, added up from j: differences of long sums would cancel
    (Dao and Gu 2024, Mamba-2, `segsum`). 0 where j >= i."""
    size = g.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    return torch.where(below, g[..., :, None].expand(*g.shape, size), 0.0).cumsum(-2)


def _seen(segments: Tensor | None, size: int, device: torch.device) -> Tensor:
    """Whether query i sees key j: [C, C], or [B, 1, ..., C, C] with segments [B, ..., C]."""
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if segments is None:
        return causal
    return causal & (segments[..., :, None] == segments[..., None, :])[:, None]


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(t.to(dtype) for t in tensors)
