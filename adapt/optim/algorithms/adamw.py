"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) by torch's fused kernel, so that its steps are torch's bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from adapt.optim.algorithms import Footprint, Shard, local


class AdamW:
    """A parameter without a gradient is left alone, as torch leaves it: nothing here communicates."""

    def state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=local(parameter).device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor | None],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
    ) -> None:
        held = [
            (local(p), local(g), *(local(s[key]) for key in ("exp_avg", "exp_avg_sq", "step")))
            for p, g, s in zip(parameters, gradients, states, strict=True)
            if g is not None
        ]
        if not held:
            return
        values, grads, means, squares, steps = map(list, zip(*held, strict=True))
        adam(
            values,
            grads,
            means,
            squares,
            [],
            steps,
            fused=True,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=group["beta1"],
            beta2=group["beta2"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def footprint(self, held: Shard, group: dict[str, Any], moved: int) -> Footprint:
        return Footprint(4 + 2 * held.local * held.itemsize)


algorithm = AdamW()
