"""A model without some of its parts, for as long as it is measured: weights are changed in place and put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapt.errors import Problem, UserError
from adapt.models.linear_mixer import LinearMixer
from adapt.models.short_convolution import ShortConvolution

Change = tuple[nn.Module, Callable[[], None]]
"""A module, and what changes its weights."""


def recurrent(model: nn.Module) -> list[tuple[int, LinearMixer]]:
    """(layer, mixer) of the layers that keep a state. Raises UserError where there are none."""
    layers = enumerate(model.get_decoder().layers)
    found = [(i, layer.self_attn) for i, layer in layers if isinstance(layer.self_attn, LinearMixer)]
    if not found:
        raise UserError("this model has no recurrent layers to look into; leave the suite out")
    return found


def recurrent_problems(suite: str, recipe: Any) -> Iterator[Problem]:
    """Where neither a conversion makes recurrent layers nor, as far as can be seen without loading it, the base has any."""
    if any(c.declares("transfers") for c in recipe.model.conversions):
        return
    import json

    kind = (recipe.model.arch or {}).get("model_type")
    with suppress(OSError, ValueError, AttributeError):
        kind = json.loads((Path(recipe.model.base) / "config.json").read_text()).get("model_type", kind)
    if kind not in (None, "adapted"):
        yield Problem(
            "", f"{suite} looks into recurrent layers, and no conversion here makes any (lawcat and mamba2 do); leave it out"
        )  # fmt: skip


@contextmanager
def without(model: nn.Module, part: str) -> Iterator[None]:
    """`part`: a key of PARTS. The model must not be computing, so that sharded weights are in their shards."""
    changes = PARTS[part](model)
    kept = [(p, p.detach().clone()) for module, _ in changes for p in module.parameters()]
    try:
        for _, change in changes:
            change()
        yield
    finally:
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)


def _silent(mixer: nn.Module) -> Change:
    """Adapters on the projection fall silent, too."""

    @torch.no_grad()
    def change() -> None:
        for parameter in mixer.o_proj.parameters():
            parameter.zero_()

    return mixer.o_proj, change


def _recurrent(model: nn.Module) -> list[Change]:
    return [_silent(mixer) for _, mixer in recurrent(model)]


def _attention(model: nn.Module) -> list[Change]:
    taken = {i for i, _ in recurrent(model)}
    return [_silent(layer.self_attn) for i, layer in enumerate(model.get_decoder().layers) if i not in taken]


def _convolutions(model: nn.Module) -> list[Change]:
    modules = (m for _, mixer in recurrent(model) for m in mixer.recurrence.modules())
    return [(m, m.pass_through) for m in modules if isinstance(m, ShortConvolution)]


def _decays(model: nn.Module) -> list[Change]:
    return [(mixer.recurrence, mixer.recurrence.forget_nothing) for _, mixer in recurrent(model)]


PARTS: dict[str, Callable[[nn.Module], list[Change]]] = {
    "recurrent": _recurrent,
    "attention": _attention,
    "convolutions": _convolutions,
    "decays": _decays,
}
