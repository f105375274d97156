"""COSMOS (Liu et al., arXiv 2502.17410): Adam in the leading r directions of the gradient's second moment, Muon in the rest.

Shapes: W, G, M [m, n] as in nn.Linear (m outputs, n inputs); U [n, r] orthonormal, the basis; S [r, r] the second moment
in it; V [m, r] Adam's second moment of GU; r = min(rank, m, n). With Shard(0) every one of G, M, V, GU and the update is
rows of this rank: sums over rows (G'(GU), the r x r products, norms) are all-reduced and Newton-Schulz runs at an owner.

The step, where H is the momentum as it is read out, gamma the weight of the Muon part and eta the group's rate:

    M <- b1 M + G                                   S <- b3 T'ST + (1 - b3) (GU)'(GU),  T = U_old'U
    U <- orth(b3 U S + (1 - b3) G'(GU))             V <- b2 V + (1 - b2) (GU)^2
    A = [HU / (sqrt(V / (1 - b2^t)) + eps)] U'      B = NewtonSchulz(H - HUU')
    D = A + gamma sqrt(mn) B / |B|                  W <- (1 - lr wd) W - eta sqrt(mn) D / |D|

so the root mean square of every update is eta. The norm of D is had from |A|, |B| and <A, B>.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adapt.optim import basis, matrices, newton_schulz
from adapt.optim.algorithms import Footprint, Shard, local
from adapt.optim.exchange import Exchange, Grid, share, traffic
from adapt.optim.matrices import Parts
from adapt.optim.newton_schulz import flops, orthogonalise

CHUNK_BYTES = 2**28
"""Of float32 gradients, how much one rank stacks and steps at once."""
GATE = 1e-4
"""A rest below this share of |H| is rounding noise, which Newton-Schulz would blow up to a whole orthogonal matrix."""
GATE_BF16 = 1e-2
"""The same where the momentum is kept in bfloat16."""


@dataclass
class Matrix:
    """One m x n matrix: this rank's rows of it, as views of the parameter and its state."""

    m: int
    n: int
    rank: int
    heights: tuple[int, ...]
    """Rows of it on every shard."""
    grid: Grid
    value: Tensor
    gradient: Tensor | None
    momentum: Tensor
    second: Tensor
    basis: Tensor
    cov: Tensor
    step: Tensor
    owner: int = 0

    def alike(self) -> tuple:
        """Matrices with the same key are stepped together."""
        fresh = bool(self.step == 0)  # on the CPU: no device waits
        return self.m, self.n, self.rank, self.heights, self.grid, self.value.dtype, self.value.device, fresh


def rank_of(rank: int | float, m: int, n: int) -> int:
    """Columns of the basis: `rank`, or that share of n in multiples of 16; never more than the matrix has."""
    wanted = rank if isinstance(rank, int) else max(16, round(rank * n / 16) * 16)
    return min(wanted, m, n)


class Cosmos:
    def state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        parts = _parts(parameter, group)
        r = max(rank_of(group["rank"], m, parts.n) for m in parts.blocks)
        experts, each = () if parts.experts is None else (parts.experts,), parts.leading()
        own = parts.place == "experts"
        shapes = {
            "proj_sq": ((*experts, parts.m, r), own or parts.place == "rows"),
            "basis": ((*each, parts.n, r), own),
            "cov": ((*each, r, r), own),
        }
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter, dtype=getattr(torch, group["momentum_dtype"])),
        } | {
            key: matrices.zeros(shape, torch.float32, parameter, sharded=sharded)
            for key, (shape, sharded) in shapes.items()
        }

    def footprint(self, held: Shard, group: dict[str, Any], moved: int) -> Footprint:
        m, n = held.shape[-2:] if not _flipped(group) else held.shape[:-3:-1]
        r = rank_of(group["rank"], m, n)
        rows = held.rows(m)
        momentum = getattr(torch, group["momentum_dtype"]).itemsize
        sent = 4 * held.reduced(n * r + r * r + 1 + 3)  # G'GU, P'P and |H|^2, the three products
        if group["gamma"]:
            sent += moved * (2 * held.exchanged(m * n) + held.shared(m * n))
        return Footprint(4 + held.local * momentum + 4 * (rows * r + n * r + r * r), sent, CHUNK_BYTES)

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor | None],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
    ) -> None:
        here: list[Matrix] = []
        with basis.full_float32():
            for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
                parts = _parts(parameter, group)
                if parts.place == "gather" or (parts.place == "rows" and group["sharded"] == "gather"):
                    self._step_gathered(parameter, gradient, state, group)
                else:
                    views = {key: local(value) for key, value in state.items()}
                    grad = None if gradient is None else local(gradient)
                    here += _matrices(parts, parameter, local(parameter), grad, views, group)
            self._step_all(here, group)
        torch._foreach_add_([state["step"] for state in states], 1.0)

    def _step_all(self, here: list[Matrix], group: dict[str, Any]) -> None:
        for one, owner in zip(here, share([(one.grid, flops(one.m, one.n)) for one in here]), strict=True):
            one.owner = owner
        buckets: dict[tuple, list[Matrix]] = {}
        for one in here:
            buckets.setdefault(one.alike(), []).append(one)
        for bucket in buckets.values():
            for chunk in _chunks(bucket):
                Chunk(chunk, group).step()

    def _step_gathered(self, parameter: Tensor, gradient: Tensor | None, state: dict[str, Tensor], group) -> None:
        """The whole step on every rank: what a sharding without whole rows needs, and what the others are tested by."""
        gradient = torch.zeros_like(parameter) if gradient is None else gradient  # the other ranks may have theirs
        grad = matrices.gathered(gradient)
        value, copies = matrices.gathered(parameter), {key: matrices.gathered(v) for key, v in state.items()}
        ranks, sharded = parameter.device_mesh.size(), (parameter, gradient, *state.values())
        moved = sum(local(t).nbytes for t in sharded if hasattr(t, "placements"))
        traffic["all_gather"] += moved * (ranks - 1)
        parts = Parts.of(value, group.get("split", ()), _flipped(group))
        self._step_all(list(_matrices(parts, value, value, grad, copies, group)), group)
        matrices.put_back(value, parameter)
        for key in ("exp_avg", "proj_sq", "basis", "cov"):
            matrices.put_back(copies[key], state[key])


def _flipped(group: dict[str, Any]) -> bool:
    return bool(group.get("transposed", False)) != (group["basis_side"] == "output")


def _parts(parameter: Tensor, group: dict[str, Any]) -> Parts:
    return Parts.of(parameter, group.get("split", ()), _flipped(group))


def _matrices(parts: Parts, parameter, value, gradient, state, group) -> Iterator[Matrix]:
    for piece in matrices.pieces(parts, parameter):
        rank = rank_of(group["rank"], piece.m, piece.n)
        second = state["proj_sq"] if piece.expert is None else state["proj_sq"][piece.expert]
        yield Matrix(
            piece.m,
            piece.n,
            rank,
            piece.heights,
            piece.grid,
            matrices.view(value, piece, parts.transposed),
            None if gradient is None else matrices.view(gradient, piece, parts.transposed),
            matrices.view(state["exp_avg"], piece, parts.transposed),
            second[piece.rows, :rank],
            state["basis"][(*piece.index, slice(None), slice(rank))],
            state["cov"][(*piece.index, slice(rank), slice(rank))],
            state["step"],
        )


def _chunks(bucket: list[Matrix]) -> Iterator[list[Matrix]]:
    """A few matrices at a time: what is whole anywhere is bounded. On the CPU batched products are slower than a loop."""
    first = bucket[0]
    size = CHUNK_BYTES * first.grid.ranks // (4 * first.m * first.n)
    if first.value.device.type in newton_schulz.LOOPED and first.grid.ranks == 1:
        size = 1
    for start in range(0, len(bucket), max(1, size)):
        yield bucket[start : start + max(1, size)]


class Chunk:
    """Matrices of one shape, grid and age, stepped together: k of them, [k, rows, n] stacked."""

    def __init__(self, items: list[Matrix], group: dict[str, Any]):
        self.items, self.group, first = items, group, items[0]
        self.m, self.n, self.r, self.grid = first.m, first.n, first.rank, first.grid
        self.device = first.value.device
        self.fresh = bool(first.step == 0)
        self.exchange = Exchange(self.grid, tuple(one.owner for one in items), first.heights, self.n)
        auto = "qr" if self.device.type == "cpu" else "cholesky"
        self.orth = auto if group["orth"] == "auto" else group["orth"]
        self.ns_dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        if group["ns_dtype"] != "auto":
            self.ns_dtype = getattr(torch, group["ns_dtype"])
        self.run = _compiled if group["compile"] else (lambda function: function)

    def step(self) -> None:
        items, group = self.items, self.group
        beta1, beta2 = group["beta1"], group["beta2"]
        beta3 = beta2 if group["beta3"] is None else group["beta3"]
        c1, c2 = self._corrections(beta1, beta2)
        g = torch.stack([self._gradient(one) for one in items])
        momenta = [one.momentum for one in items]
        torch._foreach_mul_(momenta, beta1)
        torch._foreach_add_(momenta, list(g.to(momenta[0].dtype).unbind()))
        h, hh = self.run(_read_out)(g, torch.stack(momenta).float(), c1, beta1, group["nesterov"])

        u, s = self._turn(g, beta3)
        p = g @ u
        inner, size = self._inner(p, hh)
        s = s + (1 - beta3) * inner
        v = beta2 * torch.stack([one.second for one in items]) + (1 - beta2) * p * p
        self._keep(u, (s + s.mT) / 2, v)

        a, rest = self.run(_divided)(h, u, v, c2, group["eps"], group["eps_inside"])
        floor = (GATE if momenta[0].dtype == torch.float32 else GATE_BF16) * size.sqrt()
        self._apply(a, self._muon(rest, floor, u), u)

    def _gradient(self, one: Matrix) -> Tensor:
        return torch.zeros_like(one.momentum, dtype=torch.float32) if one.gradient is None else one.gradient.float()

    def _corrections(self, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
        """(1 - b1^t) / (1 - b1) and 1 - b2^t, [k, 1, 1]."""
        t = torch.stack([one.step for one in self.items]).double() + 1
        both = torch.stack([(1 - beta1**t) / (1 - beta1), 1 - beta2**t]).float()
        c1, c2 = both.view(2, -1, 1, 1).to(self.device, non_blocking=True)
        return c1, c2

    def _total(self, values: Tensor) -> Tensor:
        """Summed over the ranks that hold the rows."""
        return self.grid.all_reduce(values.contiguous())

    def _turn(self, g: Tensor, beta3: float) -> tuple[Tensor, Tensor]:
        """The new basis, and the old second moment in it."""
        if self.r == 0:
            return g.new_zeros(g.size(0), self.n, 0), g.new_zeros(g.size(0), 0, 0)
        if self.fresh:
            start = self._from_svd(g) if self.group["init"] == "svd" else self._from_range(g)
            return start, g.new_zeros(g.size(0), self.r, self.r)
        old = torch.stack([one.basis for one in self.items])
        s = torch.stack([one.cov for one in self.items])
        y = beta3 * (old @ s) + (1 - beta3) * self._total(g.mT @ (g @ old))
        new = basis.orth(y, old, self.orth)
        turn = old.mT @ new
        return new, beta3 * (turn.mT @ s @ turn)

    def _from_range(self, g: Tensor) -> Tensor:
        return basis.from_range(g, self.r, self._total, self.orth)

    def _from_svd(self, g: Tensor) -> Tensor:
        """At the owners; a sum with zeros carries each result to the other ranks."""
        whole = self.exchange.to_owners(list(g.unbind()), torch.float32)()
        found = g.new_zeros(len(self.items), self.n, self.r)
        for place, one in zip(self.exchange.mine, whole, strict=True):
            found[place] = basis.from_svd(one, self.r)
        found = self._total(found)
        if self.grid.replicas > 1:  # an owner may be of another replica
            traffic["all_reduce"] += 2 * (self.grid.replicas - 1) * found.nbytes // self.grid.replicas
            dist.all_reduce(found, group=self.grid.across_replicas)
        return found

    def _inner(self, p: Tensor, hh: Tensor) -> tuple[Tensor, Tensor]:
        """P'P [k, r, r] and |H|^2 [k], in one message."""
        both = self._total(torch.cat([(p.mT @ p).flatten(1), hh.unsqueeze(1)], dim=1))
        return both[:, :-1].unflatten(1, (self.r, self.r)), both[:, -1]

    def _keep(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        for name, values in (("basis", u), ("cov", s), ("second", v)):
            torch._foreach_copy_([getattr(one, name) for one in self.items], list(values.unbind()))

    def _muon(self, rest: Tensor, floor: Tensor, u: Tensor) -> Tensor:
        """The rest of the momentum made orthogonal, by its owners; zero where it is noise."""
        group = self.group
        if not group["gamma"]:
            return torch.zeros_like(rest)
        whole = self.exchange.to_owners(list(rest.unbind()), self._transport())()
        done = orthogonalise(
            whole,
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            dtype=self.ns_dtype,
            floor=floor[self.exchange.mine],
        )
        b = torch.stack(self.exchange.to_rows(done)).float()
        return b - (b @ u) @ u.mT if group["reproject"] else b

    def _transport(self) -> torch.dtype:
        """What Newton-Schulz would round to anyway."""
        return self.ns_dtype if self.grid.ranks > 1 else torch.float32

    def _apply(self, a: Tensor, b: Tensor, u: Tensor) -> None:
        group, rate = self.group, self.group["lr"]
        sums = self._total(self.run(_products)(a, b, u))
        rate = rate if isinstance(rate, Tensor) else torch.tensor(rate)  # a number would be compiled in
        d = self.run(_update)(a, b, u, sums, rate, group["gamma"], (self.m * self.n) ** 0.5, group["eps"])
        values = [one.value for one in self.items]
        ratio = group["base_lr_ratio"] if group["wd_lr"] == "base" else 1.0
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - group["lr"] * ratio * group["weight_decay"])
        torch._foreach_add_(values, list(d.to(values[0].dtype).unbind()))


def _read_out(g: Tensor, m: Tensor, c1: Tensor, beta1: float, nesterov: bool) -> tuple[Tensor, Tensor]:
    """H [k, rows, n], its weights of all gradients summing to one, and |H|^2 [k] of these rows."""
    h = (g + beta1 * m) / (1 + beta1 * c1) if nesterov else m / c1
    return h, (h * h).sum((1, 2))


def _divided(h: Tensor, u: Tensor, v: Tensor, c2: Tensor, eps: float, inside: bool) -> tuple[Tensor, Tensor]:
    """A U of the Adam part A [k, rows, r], and the rest of H outside the basis."""
    hu = h @ u
    root = ((v + eps) / c2).sqrt() if inside else (v / c2).sqrt() + eps
    return hu / root, h - hu @ u.mT


def _products(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """|A|^2, |B|^2 and <A, B> of these rows, [3, k]."""
    return torch.stack([(a * a).sum((1, 2)), (b * b).sum((1, 2)), (a * (b @ u)).sum((1, 2))])


def _update(a, b, u, sums: Tensor, rate: Tensor, gamma: float, scale: float, eps: float) -> Tensor:
    """What is added to W."""
    aa, bb, ab = sums
    weight = gamma * scale / (bb.sqrt() + eps)
    size = (aa + 2 * weight * ab + weight * weight * bb).clamp_min(0).sqrt()
    return (weight.view(-1, 1, 1) * b + a @ u.mT) * (-rate * scale / (size + eps)).view(-1, 1, 1)


@cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


algorithm = Cosmos()
