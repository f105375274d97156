"""How a layer of latent attention starts from a layer of softmax attention (x-ecomla spec, section 2).

    queries  rows without and with RoPE, per head
    latent   SVD of the keys without RoPE and the values, of the teacher's own n_kv heads: repeating them for the query
             heads would give the same factors but for sqrt(g), and the same energies, at g times the size (spec 2.3)
    key      one RoPE key for all heads

Legend: d hidden size, H query heads, G key/value heads, d_h head size; d_n, d_r dimensions without and with RoPE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapt.conversion.factors import Sigma, Spectrum, spectrum
from adapt.conversion.latent_shape import TeacherShape

BALLAST = 32.0
"""Size of the constant channel over that of the others together."""


@dataclass(frozen=True)
class Attention:
    """Weights of one teacher layer, as torch keeps them ([out, in]); biases where it has them."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None


@dataclass(frozen=True)
class RopeDims:
    """Which dimensions of a teacher head the student's head consists of."""

    nope: Tensor
    """[d_n] int64, teacher dimensions without RoPE."""
    rope: Tensor
    """[d_r] int64, teacher dimensions of the student's pairs (0, 1), (2, 3), ..."""
    joint: Tensor
    """int64, ascending: teacher dimensions whose keys the latent is the best for, those without RoPE among them."""


def rope_dims(how: Literal["high", "stride", "last"], head_dim: int, nope_dim: int, rope_dim: int) -> RopeDims:
    """`high` and `stride` choose frequencies: teacher dims j and j + d_h/2 turn together, and become neighbours. `last`
    is what the authors do: the last dims, which for d_r <= d_h/2 pairs second halves with each other (spec 2.5), and a
    latent that is made for whole keys, whether they are kept or not."""
    if how == "last":
        return RopeDims(torch.arange(nope_dim), torch.arange(head_dim - rope_dim, head_dim), torch.arange(head_dim))
    half = head_dim // 2
    step = head_dim // rope_dim if how == "stride" else 1
    first = torch.arange(0, rope_dim // 2) * step
    rope = torch.stack([first, first + half], 1).flatten()
    rest = torch.ones(head_dim, dtype=torch.bool)
    rest[rope] = False
    nope = rest.nonzero()[:, 0]
    return RopeDims(nope, rope, nope)


def theta_of(how: Literal["high", "stride", "last"], theta: float, head_dim: int, rope_dim: int) -> float:
    """The student's base frequency: theta^(-2i/d_r) must be the teacher's for the i-th pair chosen."""
    return theta ** (rope_dim / head_dim) if how == "high" else theta


@dataclass(frozen=True)
class SharedKey:
    """One RoPE key in the place of G: `weight` [G, d_r], how much of each head goes in, and by how much the queries that
    saw that head's are scaled (times G, so that equal heads give 1)."""

    weight: Tensor

    def key(self, rows: Tensor) -> Tensor:
        """[G, d_r, ...] -> [d_r, ...]"""
        return torch.einsum("gr,gr...->r...", self.weight, rows)

    def queries(self, heads: int) -> Tensor:
        """[H, d_r] factors of the queries' RoPE rows."""
        kv_heads = len(self.weight)
        return (self.weight * kv_heads).repeat_interleave(heads // kv_heads, 0)


def shared_key(how: Literal["mean", "pca"], rows: Tensor, covariance: Tensor | None) -> SharedKey:
    """rows [G, d_r, d] of the key projection. `pca`: for each pair the mixture u of heads that keeps most of their
    energy, the top eigenvector of sum over (re, im) of K C Kᵀ; the queries are weighted with it in turn."""
    heads, size, _ = rows.shape
    equal = torch.full((heads, size), 1 / heads, dtype=torch.float64)
    if how == "mean":
        return SharedKey(equal)
    pairs = rows.double().unflatten(1, (-1, 2))  # [G, d_r/2, 2, d]
    seen = pairs if covariance is None else pairs @ covariance.double()
    energy = torch.einsum("gpcd,hpcd->pgh", seen, pairs)
    top = torch.linalg.eigh((energy + energy.mT) / 2)[1][..., -1]  # [d_r/2, G]
    top = top * torch.where(top.sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return SharedKey((top.T / math.sqrt(heads)).repeat_interleave(2, 1))


@dataclass(frozen=True)
class LayerStart:
    """A layer before its ranks are fixed: `weights` cuts it. Spectra are float64, on the device of the weights."""

    shape: TeacherShape
    dims: RopeDims
    rope_key: Tensor
    """[d_r, d]"""
    rope_key_bias: Tensor | None
    select: Callable[[Tensor], Tensor]
    """Rows of the query projection [H * d_h, ...] -> the student's [H * (d_n + d_r), ...], scaled."""
    teacher: Attention
    kv: Spectrum
    covariance: Tensor | None

    def weights(
        self,
        kv_rank: int,
        q_rank: int | None = None,
        sigma: Sigma = "down",
        rms: Callable[[Tensor], float] | None = None,
        ballast: bool = False,
    ) -> dict[str, Tensor]:
        """Parameters by their DeepSeek names, float64. `rms` measures the root mean square of a latent, given its down
        matrix [r_kv, d]: the latent is scaled to 1 there, so that its norm starts as the identity with a gain of ones
        (spec 8.2), and no backend's epsilon matters (8.5).

        `ballast`: the last channel of the latent holds a large constant, by a bias, that nothing reads. The norm then
        divides every token by the same number, and its gain multiplies by it: no norm, to 1 / (2 BALLAST^2) (8.3)."""
        shape, joint, v_dim = self.shape, len(self.dims.joint), self.shape.head_dim
        groups = shape.heads // shape.kv_heads
        up, down = self.kv.factors(kv_rank - ballast, sigma)
        norm = groups ** {"down": 0.5, "up": 0.0, "sqrt": 0.25}[sigma]  # of columns that are repeated for the heads
        up, down = up / norm, down * norm
        if rms is not None:
            size = rms(down)
            up, down = up * size, down / size
        if ballast:
            up, down = (torch.nn.functional.pad(t, pad) for t, pad in ((up, (0, 1)), (down, (0, 0, 0, 1))))
        keys, values = up.split([shape.kv_heads * joint, shape.kv_heads * v_dim])
        keys = keys.unflatten(0, (shape.kv_heads, joint))[:, torch.searchsorted(self.dims.joint, self.dims.nope)]
        per_head = torch.cat([keys, values.unflatten(0, (-1, v_dim))], 1)
        repeated = per_head.repeat_interleave(groups, 0)  # query head h saw head h // g
        found = {
            "kv_a_proj_with_mqa.weight": torch.cat([down, self.rope_key]),
            "kv_b_proj.weight": repeated.flatten(0, 1),
            "o_proj.weight": self.teacher.o,
        }
        if q_rank is None:
            found["q_proj.weight"] = self.select(self.teacher.q.double())
        else:
            wide, narrow = spectrum(self.teacher.q, self.covariance).factors(q_rank, sigma)
            found |= {"q_a_proj.weight": narrow, "q_b_proj.weight": self.select(wide)}
        found |= self._biases(kv_rank, "q_proj" if q_rank is None else "q_b_proj")
        if ballast:
            bias = found.setdefault("kv_a_proj_with_mqa.bias", down.new_zeros(len(down) + len(self.rope_key)))
            bias[kv_rank - 1] = BALLAST * math.sqrt(kv_rank)
            found["kv_a_layernorm.weight"] = torch.cat([down.new_full((kv_rank - 1,), BALLAST), down.new_zeros(1)])
        return found

    def _biases(self, kv_rank: int, query: str) -> dict[str, Tensor]:
        """Keys without RoPE need none: it would add the same to all scores of a query. The values' passes through the
        attention, whose weights sum to 1, and meets the output projection (spec 2.10)."""
        t, found = self.teacher, {}
        if t.q_bias is not None:
            found[f"{query}.bias"] = self.select(t.q_bias.double())
        if self.rope_key_bias is not None:
            zeros = self.rope_key_bias.new_zeros(kv_rank)
            found["kv_a_proj_with_mqa.bias"] = torch.cat([zeros, self.rope_key_bias])
        if t.v_bias is not None:
            heads = t.v_bias.double().unflatten(0, (self.shape.kv_heads, -1))
            out = t.o.double() @ heads.repeat_interleave(self.shape.heads // self.shape.kv_heads, 0).flatten()
            found["o_proj.bias"] = out if t.o_bias is None else out + t.o_bias.double()
        elif t.o_bias is not None:
            found["o_proj.bias"] = t.o_bias
        return found


def start_layer(
    teacher: Attention,
    shape: TeacherShape,
    dims: RopeDims,
    key: Literal["mean", "pca"] = "mean",
    covariance: Tensor | None = None,
) -> LayerStart:
    """`covariance` [d, d] of the attention's inputs weighs the decompositions; None: the weights alone."""
    keys = teacher.k.double().unflatten(0, (shape.kv_heads, shape.head_dim))
    values = teacher.v.double().unflatten(0, (shape.kv_heads, shape.head_dim))
    one = shared_key(key, keys[:, dims.rope], covariance)
    bias = None
    if teacher.k_bias is not None:
        bias = one.key(teacher.k_bias.double().unflatten(0, (shape.kv_heads, shape.head_dim))[:, dims.rope])
    scale = math.sqrt((len(dims.nope) + len(dims.rope)) / shape.head_dim)  # the softmax scale is (d_n + d_r)^-1/2
    factor = scale * one.queries(shape.heads)

    def select(rows: Tensor) -> Tensor:
        heads = rows.unflatten(0, (shape.heads, shape.head_dim))
        turned = heads[:, dims.rope]
        turned = turned * factor.view(*factor.shape, *[1] * (turned.ndim - 2))
        return torch.cat([scale * heads[:, dims.nope], turned], 1).flatten(0, 1)

    joint = torch.cat([keys[:, dims.joint].flatten(0, 1), values.flatten(0, 1)])
    return LayerStart(
        shape=shape,
        dims=dims,
        rope_key=one.key(keys[:, dims.rope]),
        rope_key_bias=bias,
        select=select,
        teacher=teacher,
        kv=spectrum(joint, covariance),
        covariance=covariance,
    )
