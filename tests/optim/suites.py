"""One group of matrices under an algorithm, without a model around it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from adapt.components import optimizers
from adapt.optim.suite import Suite

SHAPES = [(24, 24), (40, 24), (24, 40), (1, 20), (20, 1)]


def suite(name: str, parameters: Iterable[nn.Parameter], *, split=(), transposed=False, **fields) -> Suite:
    """The matrices' group of the registered optimizer `name` with `fields`, for `parameters`."""
    config = optimizers[name].config_type(**fields)
    held = list(parameters)
    own = {"lr": config.rate("matrix"), "base_lr_ratio": config.lr / config.rate("matrix")}
    own |= {"weight_decay": config.weight_decay, "split": split, "transposed": transposed, "role": "matrix"}
    return Suite([{"params": held, "names": [str(i) for i in range(len(held))]} | config.group() | own])


def weights(shapes=tuple(SHAPES), seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(parameters: Iterable[Tensor], step: int, scale: float = 1.0) -> list[Tensor]:
    """Those of step number `step`: the same for every run over the same shapes."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [scale * torch.randn(p.shape, generator=generator) for p in parameters]


def steps(optimizer: Suite, first: int, last: int, **kwargs) -> None:
    """Steps number first to last - 1 on those gradients."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        for parameter, gradient in zip(parameters, gradients(parameters, step, **kwargs), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def close(ours: Iterable[Tensor], theirs: Iterable[Tensor], before: Iterable[Tensor]) -> float:
    """The largest distance of two results, as a share of the way from `before` to the second."""
    triples = [[t.detach().double() for t in three] for three in zip(ours, theirs, before, strict=True)]
    return max(float((a - b).norm() / (b - c).norm()) for a, b, c in triples)
