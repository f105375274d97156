"""A budget of cache shared out over layers: each step of rank goes where it keeps most (x-ecomla spec, section 2.6).

Singular values fall, so the gains of a layer's steps fall too, and taking the largest gain next is not only greedy: no
other ranks within the budget lose less energy in all.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from adapt.conversion.latent_shape import MULTIPLE, TeacherShape


def latent_room(share: float, teacher: TeacherShape, layers: int, converted: int, rope_dim: int) -> int:
    """Numbers per token for the latents of all converted layers together, where the model's whole cache is at most
    `share` of the teacher's; layers that stay cost what they did. Below 0 where there is no room."""
    whole = int(share * layers * teacher.cache + 1e-6)
    return whole - (layers - converted) * teacher.cache - converted * rope_dim


def allocated(energies: Sequence[Sequence[float]], room: int, most: int, ballast: int = 0) -> list[int]:
    """Ranks of the layers: multiples of 8, at least 8 and at most `most`, their sum the largest within `room`, the sum of
    the energies they lose the least.

    energies: squared singular values of each layer, descending; `ballast` channels of each rank hold none of them. Equal
    layers differ by one step at most, the first having more. `room` must be at least 8 for each layer."""
    ranks = [MULTIPLE] * len(energies)

    def offer(layer: int) -> tuple[float, int, int]:
        start = ranks[layer] - ballast
        return -sum(energies[layer][start : start + MULTIPLE]), ranks[layer], layer

    waiting = [offer(layer) for layer in range(len(energies)) if most >= MULTIPLE * 2]
    heapq.heapify(waiting)
    for _ in range(room // MULTIPLE - len(energies)):
        if not waiting:
            break
        layer = heapq.heappop(waiting)[2]
        ranks[layer] += MULTIPLE
        if ranks[layer] + MULTIPLE <= most:
            heapq.heappush(waiting, offer(layer))
    return ranks


def evenly(layers: int, room: int, most: int) -> list[int]:
    """The ranks of layers that are all alike: what is planned while no weights are there."""
    return allocated([[0.0]] * layers, room, most)
