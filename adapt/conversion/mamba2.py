"""Attention layers become Mamba-2 mixers that start from the teacher's projections: C from the queries, B from the keys,
x from the values (Wang et al. 2024, "The Mamba in the Llama"; adapt/models/mamba2.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapt.components import conversions
from adapt.conversion.lawcat import refuse_blocks
from adapt.conversion.layer_map import planned
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
    """Layers to convert: `all`, a list of ids from 0, or `every_N` (0, N, 2N, ...). Half of them, as published."""
    keep: str | tuple[int, ...] = "none"
    """Layers that keep their attention, whatever `layers` says: a list, or `every_N` (N-1, 2N-1, ...)."""
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
        if self.chunk < 16 or self.chunk % 16:
            yield Problem("", f"chunk={self.chunk} must be a multiple of 16; 64 is usual")
        if self.conv_width < 1:
            yield Problem("", f"conv_width={self.conv_width} must be 1 or more (1: the token alone); 4 is usual")
        yield from refuse_blocks(recipe)


class Mamba2:
    transfers = True

    def __init__(self, config: Mamba2Config, seed: int):
        self.config, self.seed = config, seed
        self.reads_layers = config.norm and config.init == "identity"

    def plan(self, config, tokenizer):
        c = self.config
        options = {"init": c.init, "norm": c.norm, "conv_width": c.conv_width, "chunk": c.chunk}
        options["conv_silu"] = c.init == "mamba_in_llama"
        return planned(config, "mamba2", c.layers, c.keep, options), tokenizer

    def apply(self, model, tokenizer):
        from adapt.conversion.mixers import with_mixers

        student = with_mixers(model, self.plan(model.config, tokenizer)[0], self.seed)
        if self.reads_layers and model.device.type != "meta":
            _set_norms(student, model, tokenizer)
        return student


@conversions.register("mamba2")
def mamba2(config: Mamba2Config, recipe) -> Mamba2:
    return Mamba2(config, recipe.run.seed)


def _set_norms(student, model, tokenizer) -> None:
    """Each head's norm weight becomes the root mean square of the teacher's head on TEXT."""
    import torch

    sizes: dict[int, torch.Tensor] = {}
    layers = student.get_decoder().layers
    new = [i for i, layer in enumerate(layers) if layer.mixer == "mamba2" and not _converted(model, i)]

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


def _converted(model, index: int) -> bool:
    return (getattr(model.config, "token_mixers", None) or {index: "attention"})[index] != "attention"
