"""A pretrained model without its decoder layers' weights: those stay in the files, and each rank reads its rows of them.

What is outside the layers (embedding, norm, head) is read, since conversions of the vocabulary work on it; the layers are
on the meta device, with whatever conversions and adapters put into them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt.config.schema import Recipe
from adapt.pretrained import block_diffusion_formats as formats
from adapt.pretrained.load import lacks, load_config, readable_folder


@dataclass(frozen=True)
class WeightFiles:
    """Where each weight of a checkpoint is."""

    files: dict[str, Path]

    @classmethod
    def of(cls, folder: Path) -> WeightFiles:
        from safetensors import safe_open

        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return cls(found)

    def rows(self, wanted: dict[str, tuple[int, int] | None]) -> Iterator[tuple[str, Any]]:
        """(name, tensor) for each name: its rows from start to stop, or (None) all of it. Only those are read."""
        from safetensors import safe_open

        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, "pt")) for path in {self.files[n] for n in wanted}}
            for name, part in wanted.items():
                file = opened[self.files[name]]
                yield name, file.get_tensor(name) if part is None else file.get_slice(name)[slice(*part)]


def load_outline(recipe: Recipe) -> tuple[Any, WeightFiles] | None:
    """(model, the files its layers are in); dtype, mode and attention as `load_model` has them. None where the files name
    their weights otherwise than the model does, so that only transformers can read them."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = readable_folder(recipe)
    if formats.format_of(folder) is not None:
        return None
    with torch.device("meta"):
        config = load_config(recipe.model)
        if config.model_type == "adapted":
            from adapt.models.modeling_adapted import register

            register()
        dtype = getattr(torch, recipe.model.dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    files, layers = WeightFiles.of(folder), layer_prefix(model)
    names = dict(model.named_parameters())
    if not {n for n in names if n.startswith(layers)} <= files.files.keys():
        return None
    outside = [n for n in names if not n.startswith(layers)]
    if wrong := sorted(n for n in outside if n not in files.files):
        raise lacks(recipe, wrong)
    for name, weight in files.rows(dict.fromkeys(outside)):
        put(model, name, weight.to(dtype, copy=True))
    model.tie_weights()
    rebuild_rotary(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, files


def layer_prefix(model: Any) -> str:
    layers = model.get_decoder().layers
    return next(name for name, module in model.named_modules() if module is layers) + "."


def put(model: Any, name: str, value: Any) -> None:
    """Another tensor in a parameter's place."""
    from torch import nn

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(value, requires_grad=getattr(module, leaf).requires_grad))


def rebuild_rotary(model: Any) -> None:
    """Frequencies are in no file, and on the meta device there are none."""
    for name, module in list(model.named_modules()):
        if any(b.is_meta for b in module.buffers(recurse=False)) and hasattr(module, "inv_freq"):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, type(module)(config=module.config))
