"""Tiny recurrences, and the pieces their tests share."""

from __future__ import annotations

import torch

from adapt.models.configuration_adapted import AdaptedConfig
from adapt.models.modeling_adapted import AdaptedForCausalLM
from tests import tiny

MIXERS = ("gated_linear", "mamba2")
VARIANTS = {
    "lawcat": ("gated_linear", {}),
    "lawcat, exact": ("gated_linear", {"exact": True}),
    "one decay a head": ("gated_linear", {"gate": "head", "features": 6}),
    "mamba2 identity": ("mamba2", {}),
    "mamba2 as published": ("mamba2", {"init": "mamba_in_llama", "conv_silu": True}),
}


def student(mixer: str = "gated_linear", options: dict | None = None, *, layers=(0, 1), family="llama", **over):
    """A tiny student in float64 whose recurrences are anywhere but where they start."""
    over = {"dtype": torch.float64, "seed": 0} | over
    dtype, seed = over.pop("dtype"), over.pop("seed")
    config = AdaptedConfig.of(tiny.tiny_config(family, **over), dict.fromkeys(layers, mixer), {mixer: options or {}})
    base = tiny.tiny_model(family, seed=seed, **over)
    model = AdaptedForCausalLM(config)
    model.load_state_dict(base.state_dict(), strict=False)
    stir(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def stir(model, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".recurrence." in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 320, (rows, length), generator=torch.Generator().manual_seed(seed))
