"""Attention layers become Mamba-2 mixers that start from the teacher's projections: C from the queries, B from the keys,
x from the values (Wang et al. 2024, "The Mamba in the Llama"; adapt/models/mamba2.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapt.components import conversions
from adapt.conversion.layer_map import token_mixers
from adapt.conversion.recurrent import Recurrent, mixer_problems, text_for_steps
from adapt.errors import Problem

TEXT = (
    "The harbour lay quiet in the early light. Two boats had come back during the night, and their crews were asleep. "
    "Prices rose by 3.5 % in 2019, after ten years without much change; nobody had expected it. "
    "To compute the mean, add the numbers up and divide by how many there are: mean = sum(values) / len(values)."
)
"""What the norms are set by: any ordinary text does, since only the size of each head's output is read."""


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    layers: str | tuple[int, ...] = "every_2"
    """Layers to convert: `all`, a list of ids from 0, `every_N` (0, N, 2N, ...), or `auto`: all but those whose heads are
    hardest to imitate, which a short attention transfer on the training text finds out.
    Published models convert half of them."""
    keep: str | tuple[int, ...] = "none"
    """Layers that keep their attention, whatever `layers` says: a list, or `every_N` (N-1, 2N-1, ...)."""
    attention_share: float | None = None
    """Of all layers, the share that keeps its attention under `layers: auto`, those of `keep` included. null: 0.25."""
    auto_steps: int = 24
    """Steps of two rows, of which `layers: auto` learns from three quarters and measures on the others."""
    init: Literal["identity", "mamba_in_llama"] = "identity"
    """Where what is new starts. `identity`: everything passes, and a layer is decayed linear attention on the teacher's
    queries and keys; `mamba_in_llama`: at random, with SiLU after the convolution, as published."""
    norm: bool = True
    """RMSNorm of each head's output, which starts at the size the teacher's heads have. Without it outputs grow with
    the length of the row."""
    conv_width: int = 4
    """Taps of the convolution."""
    chunk: int = 64
    """Tokens that training computes by matrix products at a time; a multiple of 16."""

    def problems(self, recipe) -> Iterator[Problem]:
        yield from mixer_problems(self, recipe)


class Mamba2(Recurrent):
    mixer = "mamba2"

    @property
    def reads_layers(self) -> bool:
        return super().reads_layers or self._sets_norms

    @property
    def _sets_norms(self) -> bool:
        return self.config.norm and self.config.init == "identity"

    def options(self, config):
        c = self.config
        options = {"init": c.init, "norm": c.norm, "conv_width": c.conv_width, "chunk": c.chunk}
        return options | {"conv_silu": c.init == "mamba_in_llama"}

    def started(self, model, config, tokenizer):
        student = super().started(model, config, tokenizer)
        if self._sets_norms and model.device.type != "meta":
            _set_norms(student, model, tokenizer)
        return student


@conversions.register("mamba2")
def mamba2(config: Mamba2Config, recipe) -> Mamba2:
    return Mamba2(config, recipe.run.seed, text_for_steps(recipe))


def _set_norms(student, model, tokenizer) -> None:
    """Each head's norm weight becomes the root mean square of the teacher's head on TEXT."""
    import torch

    sizes: dict[int, torch.Tensor] = {}
    layers = student.get_decoder().layers
    new = [
        i for i, layer in enumerate(layers) if layer.mixer == "mamba2" and token_mixers(model.config)[i] == "attention"
    ]

    def read(index: int):
        def hook(module, args):
            heads = args[0].detach().float().unflatten(-1, (-1, student.config.head_dim))
            sizes[index] = heads.square().mean((0, 1, 3)).sqrt()

        return hook

    hooks = [model.get_decoder().layers[i].self_attn.o_proj.register_forward_pre_hook(read(i)) for i in new]
    training = model.training
    try:
        with torch.no_grad():
            ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
            model.eval()(ids[:, : model.config.max_position_embeddings].to(model.device), use_cache=False)
            for i in new:
                layers[i].self_attn.recurrence.norm.copy_(sizes[i][:, None])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
