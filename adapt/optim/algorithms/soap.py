"""SOAP (Vyas et al., arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioner.

    L <- b3 L + (1 - b3) GG'        R <- b3 R + (1 - b3) G'G        Q_L, Q_R their eigenvectors, leading first
    M, V: Adam's moments of Q_L'GQ_R                                W <- W - lr Q_L [M / (sqrt(V) + eps)] Q_R', then decay

As in the authors' code, the first step only makes the bases and leaves the weights alone; every `precondition_frequency`
steps Q becomes the orthonormal factor of LQ, its columns sorted by their Rayleigh quotients, after the update, so that a
gradient is never rotated by a basis it has shaped. M and V are kept in the basis; M is carried over when the basis turns
(the authors rotate it there and back at every step, which is the identity in between), V has its entries permuted only.

Everything is kept by rows: M, V and L, Q_L as the parameter's, R, Q_R by theirs. An owner has a matrix and its state whole
while it steps, and sends rows of what has changed back; no rank ever holds more than its share and one chunk. Per rank
and matrix that is 4 (6mn + 3m² + 3n²)(W-1)/W² bytes a step on W ranks, and 4 (m² + n²)(W-1)/W² more in a step that turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapt.optim import matrices, newton_schulz
from adapt.optim.algorithms import Footprint, Shard, local
from adapt.optim.exchange import Exchange, Grid, share, traffic
from adapt.optim.matrices import Parts, Piece
from adapt.optim.newton_schulz import symmetric

CHUNK_BYTES = 2**28
"""Of float32 gradients, moments and bases that one rank holds whole at once."""
LEFT, RIGHT = ("cov_left", "basis_left"), ("cov_right", "basis_right")


@dataclass
class Matrix:
    """This rank's rows of one m x n matrix: `held` are views of the parameter, its gradient and its state."""

    m: int
    n: int
    grid: Grid
    heights: dict[str, tuple[int, ...]]
    """Of every entry of `held`, the rows on each shard."""
    held: dict[str, Tensor]
    calls: int
    """Steps before this one, the first (which makes the bases) included."""
    owner: int = 0

    def alike(self) -> tuple:
        value, shapes = self.held["value"], tuple(self.heights.items())
        return self.m, self.n, self.grid, shapes, value.dtype, value.device, self.calls


class Soap:
    def state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        parts = _parts(parameter, group)
        sides = {side for m in parts.blocks for side in sides_of(m, parts.n, group)}
        experts, m = () if parts.experts is None else (parts.experts,), max(parts.blocks)
        shapes = {key: (*experts, parts.m, m) for key in LEFT if "left" in sides}
        shapes |= {key: (*experts, len(parts.blocks) * parts.n, parts.n) for key in RIGHT if "right" in sides}
        moments = {key: torch.zeros_like(parameter, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
        made = {key: _zeros(shape, parameter, parts) for key, shape in shapes.items()}
        return {"step": torch.zeros((), dtype=torch.float32)} | moments | made

    def footprint(self, held: Shard, group: dict[str, Any], moved: int) -> Footprint:
        """Sent: gradient and moments to the owner, moments and update back, and of each basis its two halves likewise."""
        m, n = held.shape[-2:]
        lengths = [{"left": m, "right": n}[side] for side in sides_of(m, n, group)]
        turns = 1 / group["precondition_frequency"]
        state = 4 + 4 * (2 * held.local + sum(2 * held.rows(size) * size for size in lengths))
        of_bases = sum((3 + turns) * size * size for size in lengths)
        moved_once = held.exchanged(6 * m * n + of_bases)
        back = held.shared(3 * m * n + sum((1 + turns) * size * size for size in lengths))
        return Footprint(state, 4 * (moved_once + back), CHUNK_BYTES)

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor | None],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
    ) -> None:
        here: list[Matrix] = []
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            parts = _parts(parameter, group)
            if parts.place == "gather":
                _step_gathered(parameter, gradient, state, group)
            else:
                here += _matrices(parts, parameter, gradient, state, group)
        _step_all(here, group)
        torch._foreach_add_([state["step"] for state in states], 1.0)


def sides_of(m: int, n: int, group: dict[str, Any]) -> list[str]:
    """Which sides of an m x n matrix have a basis: none that is too long, only the shorter one if so asked."""
    wanted = {"left": m, "right": n}
    if group["sides"] == "smaller":
        del wanted["right" if m < n else "left"]
    return [side for side, size in wanted.items() if size <= group["max_precond_dim"]]


def _parts(parameter: Tensor, group: dict[str, Any]) -> Parts:
    return Parts.of(parameter, group["split"], group["transposed"])


def _zeros(shape: tuple[int, ...], parameter: Tensor, parts: Parts) -> Tensor:
    """float32, cut along dimension 0 as the parameter is (each by its own number of rows)."""
    if not hasattr(parameter, "placements"):
        return torch.zeros(shape, device=parameter.device)
    from torch.distributed.tensor import Replicate, zeros

    mesh = parameter.device_mesh
    placements = [Replicate()] * mesh.ndim if parts.place == "gather" else parameter.placements
    return zeros(shape, dtype=torch.float32, device_mesh=mesh, placements=placements)


def _matrices(parts: Parts, parameter, gradient, state, group) -> Iterator[Matrix]:
    here, calls = {key: local(entry) for key, entry in state.items()}, int(state["step"])  # on the CPU: no device waits
    value = local(parameter)
    grad = torch.zeros_like(value) if gradient is None else local(gradient)
    right = replace(parts, blocks=(parts.n,) * len(parts.blocks), transposed=False)
    for piece, aside in zip(matrices.pieces(parts, parameter), matrices.pieces(right, parameter), strict=True):
        held = {
            key: matrices.view(tensor, piece, parts.transposed)
            for key, tensor in {"value": value, "gradient": grad, **here}.items()
            if key in ("value", "gradient", "exp_avg", "exp_avg_sq")
        }
        heights = dict.fromkeys(held, piece.heights)
        for side in sides_of(piece.m, piece.n, group):
            for key in LEFT if side == "left" else RIGHT:
                of: Piece = piece if side == "left" else aside
                width = piece.m if side == "left" else piece.n
                held[key], heights[key] = matrices.view(here[key], of, False)[:, :width], of.heights
        yield Matrix(piece.m, piece.n, piece.grid, heights, held, calls)


def _step_all(here: list[Matrix], group: dict[str, Any]) -> None:
    costs = [(one.grid, one.m * one.n * (one.m + one.n)) for one in here]
    for one, owner in zip(here, share(costs), strict=True):
        one.owner = owner
    buckets: dict[tuple, list[Matrix]] = {}
    for one in here:
        buckets.setdefault(one.alike(), []).append(one)
    for bucket in buckets.values():
        first = bucket[0]
        each = 4 * (4 * first.m * first.n + 2 * first.m**2 + 2 * first.n**2)
        size = max(1, CHUNK_BYTES * first.grid.ranks // each)
        if first.held["value"].device.type in newton_schulz.LOOPED and first.grid.ranks == 1:
            size = 1
        for start in range(0, len(bucket), size):
            _step_chunk(bucket[start : start + size], group)


def _step_chunk(items: list[Matrix], group: dict[str, Any]) -> None:
    """To the owners, a step of whole matrices [k, m, n], and back."""
    first = items[0]
    owners = tuple(one.owner for one in items)
    exchanges = {
        key: Exchange(first.grid, owners, first.heights[key], tensor.size(1)) for key, tensor in first.held.items()
    }
    coming = {
        key: exchange.to_owners([one.held[key] for one in items], torch.float32)
        for key, exchange in exchanges.items()
        if key != "value"
    }
    whole = {key: arrive() for key, arrive in coming.items()}
    alone = first.held["value"].device.type in newton_schulz.LOOPED
    batches = [slice(i, i + 1) for i in range(len(whole["gradient"]))] if alone else [slice(None)]
    update = torch.empty_like(whole["gradient"]) if first.calls else None
    for batch in batches:
        views = {key: tensor[batch] for key, tensor in whole.items()}
        if update is None:
            _make_bases(views, group)
        else:
            update[batch] = _step_whole(views, first.calls, group)
    turned = first.calls % group["precondition_frequency"] == 0  # the first step included
    for key in whole:  # in the same order on every rank
        if key == "gradient" or (key.startswith("basis") and not turned):
            continue
        _put([one.held[key] for one in items], exchanges[key].to_rows(whole[key]))
    if update is not None:
        values = [one.held["value"] for one in items]
        rows = exchanges["value"].to_rows(update)
        torch._foreach_add_(values, [row.to(v.dtype) for row, v in zip(rows, values, strict=True)])
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])


def _put(rows: list[Tensor], results: list[Tensor]) -> None:
    for row, result in zip(rows, results, strict=True):
        if row.data_ptr() != result.data_ptr():  # with one process the step was made on the state itself
            row.copy_(result)


def _sides(whole: dict[str, Tensor]) -> list[str]:
    return [side for side in ("left", "right") if f"cov_{side}" in whole]


def _accumulate(whole: dict[str, Tensor], group: dict[str, Any]) -> None:
    """L, R with this gradient."""
    g, beta = whole["gradient"], group["beta2"] if group["shampoo_beta"] is None else group["shampoo_beta"]
    for side in _sides(whole):
        x, cov = g if side == "left" else g.mT, whole[f"cov_{side}"]
        if g.size(0) == 1:  # a single product is by blocks on the CPU
            x, cov = x[0], cov[0]
        symmetric(x, x.mT, plus=cov, beta=beta, alpha=1 - beta, out=cov)


def _make_bases(whole: dict[str, Tensor], group: dict[str, Any]) -> None:
    """The first step: L, R of the first gradient and their eigenvectors, largest eigenvalue first."""
    _accumulate(whole, group)
    for side in _sides(whole):
        whole[f"basis_{side}"].copy_(torch.linalg.eigh(whole[f"cov_{side}"]).eigenvectors.flip(-1))


def _step_whole(whole: dict[str, Tensor], t: int, group: dict[str, Any]) -> Tensor:
    """Adam's step number `t` in the basis, then the preconditioners: changes `whole`, [k, m, n] and [k, m, m], in place.

    Returns what is to be added to the weights.
    """
    beta1, beta2 = group["beta1"], group["beta2"]
    mean, square = whole["exp_avg"], whole["exp_avg_sq"]
    turned = _rotate(whole["gradient"], whole)
    mean.lerp_(turned, 1 - beta1)
    square.mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
    update = _rotate(mean / square.sqrt().add_(group["eps"]), whole, back=True)
    update *= -group["lr"] * ((1 - beta2**t) ** 0.5 / (1 - beta1**t))
    _accumulate(whole, group)
    if t % group["precondition_frequency"] == 0:
        plain = _rotate(mean, whole, back=True)
        for side in _sides(whole):
            basis, order = _power(whole[f"cov_{side}"], whole[f"basis_{side}"])
            whole[f"basis_{side}"].copy_(basis)
            along, across = (-2, -1) if side == "left" else (-1, -2)
            square.copy_(square.gather(along, order.unsqueeze(across).expand_as(square)))
        mean.copy_(_rotate(plain, whole))
    return update


def _rotate(x: Tensor, whole: dict[str, Tensor], back: bool = False) -> Tensor:
    """Q_L' X Q_R, or Q_L X Q_R' `back`; a side without basis stays."""
    left, right = whole.get("basis_left"), whole.get("basis_right")
    if left is not None:
        x = (left if back else left.mT) @ x
    if right is not None:
        x = x @ (right.mT if back else right)
    return x


def _power(cov: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration from the basis sorted by its Rayleigh quotients, and that order [k, size]."""
    power = cov @ basis
    order = (basis * power).sum(-2).argsort(-1, descending=True)
    return torch.linalg.qr(power.gather(-1, order.unsqueeze(-2).expand_as(power))).Q, order


def _step_gathered(parameter: Tensor, gradient: Tensor | None, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """The whole step on every rank, for a sharding without whole rows."""
    gradient = torch.zeros_like(parameter) if gradient is None else gradient  # the other ranks may have theirs
    moved = sum(local(t).nbytes for t in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"]))
    traffic["all_gather"] += moved * (parameter.device_mesh.size() - 1)
    copies = {key: matrices.gathered(tensor) for key, tensor in state.items()}
    value, grad = matrices.gathered(parameter), matrices.gathered(gradient)
    _step_all(list(_matrices(_parts(value, group), value, grad, copies, group)), group)
    matrices.put_back(value, parameter)
    for key, copy in copies.items():
        matrices.put_back(copy, state[key])


algorithm = Soap()
