"""The export of a sharded run: no rank ever holds the whole model.

The decoder layers are gathered one weight at a time, on the rank that writes the file they go into; there, adapters are
merged and the weights take the form of the stock class, in a skeleton whose other layers stay on the meta device. Then all
ranks read the folder back as they would read a base, each its rows, and compare its logits with those of the trained model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from adapt.config.schema import Export, Recipe
from adapt.distributed import world as worlds
from adapt.distributed.shard import make_mesh, shard
from adapt.distributed.sharded_start import fill
from adapt.distributed.world import World
from adapt.export import verify
from adapt.export.folder import letter
from adapt.export.stock import stock_form
from adapt.export.weights import stock_copy
from adapt.pretrained.cache import new_folder
from adapt.pretrained.lora import add_lora, merge_lora
from adapt.pretrained.outline import WeightFiles, layer_prefix, put, rebuild_rotary
from adapt.train.build import compute_dtype
from adapt.train.root import Frozen, Root, look, look_at
from adapt.train.signals import StopFlag, stop_point

T = TypeVar("T")
FILE = 4 * 10**9
"""Bytes of a file of weights, more or less a layer: what one rank holds besides its shards."""
OUTSIDE = -1
"""Stands for what is in no layer (embedding, norm, head), which goes together, as in every forward."""


class Shards:
    """The student of `root`, as adapt.export.weights.Weights. `flag`: of signals, which are seen between two files."""

    def __init__(self, root: Root, recipe: Recipe, world: World, flag: StopFlag | None = None):
        self.root, self.recipe, self.world, self.flag = root, recipe, world, flag

    def alone(self, work: Callable[[], T]) -> T | None:
        return worlds.on_main(self.world, work, self.flag)

    def stock(self, export: Export, extra_config: dict[str, Any]) -> Any:
        self._form = partial(_form, target=export.target, dtype=export.dtype, extra=extra_config)
        self._skeleton = _skeleton(self.root.student, self.recipe)
        return self._form(copy.deepcopy(self._skeleton))

    @contextmanager
    def folder(self, target: Path) -> Iterator[Path]:
        def begin() -> Path:
            with letter(target):
                return stack.enter_context(new_folder(target))

        with ExitStack() as stack:
            yield worlds.from_main(self.alone(begin))

    def write(self, folder: Path, stock: Any) -> None:
        files = _files(stock)
        trouble = ""
        for number, (file, parts) in enumerate(files.items()):
            if self.flag is not None:
                stop_point(self.flag, self.world, "while the export was written; everything else is saved")
            mine = number % self.world.size == self.world.rank
            model = copy.deepcopy(self._skeleton) if mine else None
            for name, tensor in self._tensors(parts):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # collective
                if model is not None:
                    _put(model, name, whole.to("cpu", copy=True))
            if model is not None and not trouble:
                try:
                    _write(folder / file, self._form(model), parts)
                except Exception as error:  # the others go on to the next file meanwhile
                    trouble = f"{getattr(error, 'strerror', None) or error}"
        told = [line for line in worlds.together(lambda: trouble) if line]

        def rest() -> None:
            with letter(folder):
                if told:
                    raise OSError(told[0])
                _write_rest(folder, stock, files)

        self.alone(rest)

    def compare(self, folder: Path, stock: Any, tokenizer: Any) -> dict[str, Any]:
        dtype = str(stock.dtype).removeprefix("torch.")
        model = verify.outline(folder, dtype)
        rebuild_rotary(model)
        reloaded = Frozen(model)
        shard(reloaded, [model], make_mesh(self.world, self.recipe.trainer.mesh), None)
        fill(model, WeightFiles.of(folder), self.world.device, seed=0)
        ids = verify.ids_of(tokenizer, stock.config)
        reference = look(self.root, lambda models: verify.logits(models.student, ids))
        written = look_at(reloaded, lambda models: verify.logits(models.student, ids))
        compute = str(compute_dtype(self.recipe, self.world)).removeprefix("torch.")
        tolerance = max(verify.ROUNDING[dtype], verify.ROUNDING[compute])
        found = verify.closeness(written, reference, dtype, tolerance)
        return found | look_at(reloaded, lambda models: verify.cache_bytes(models.student, ids))

    def _tensors(self, parts: list[int]) -> Iterator[tuple[str, Tensor]]:
        """Parameters and saved buffers of some parts, in the same order on all ranks."""
        student = self.root.student
        prefix, kept = layer_prefix(student), student.state_dict().keys()
        saved = [(n, b) for n, b in student.named_buffers() if n in kept]
        for name, tensor in [*student.named_parameters(), *saved]:
            if _part(name, prefix) in parts:
                yield name, tensor.detach()


def _skeleton(student: Any, recipe: Recipe) -> Any:
    """A module like the student on the meta device, adapters included, as no part of FSDP."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(student.config)
    config.use_cache = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=student.dtype, attn_implementation="sdpa")
    if recipe.trainable.lora is not None:
        model = add_lora(model, recipe.trainable.lora)
    model.generation_config = student.generation_config
    have, want = ({n: p.shape for n, p in m.named_parameters()} for m in (model, student))
    if have != want:
        raise RuntimeError(f"the student is not what its config says: {sorted(have.items() ^ want.items())[:3]}")
    return model.eval().requires_grad_(False)


def _form(model: Any, *, target: str, dtype: str, extra: dict[str, Any]) -> Any:
    model.tie_weights()
    return stock_copy(stock_form(merge_lora(model), target), dtype, extra)


def _part(name: str, prefix: str) -> int:
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else OUTSIDE


def _saved(stock: Any) -> dict[str, Tensor]:
    """What a file has to hold: tied weights once."""
    own = dict(stock.named_parameters())
    tied = {n for n, _ in stock.named_parameters(remove_duplicate=False)} - own.keys()
    return {n: t for n, t in stock.state_dict().items() if n not in tied}


def _files(stock: Any) -> dict[str, list[int]]:
    """File -> parts of the model in it, layers in order and what is outside them last."""
    prefix, sizes = layer_prefix(stock), dict[int, int]()
    for name, tensor in _saved(stock).items():
        part = _part(name, prefix)
        sizes[part] = sizes.get(part, 0) + tensor.numel() * tensor.element_size()
    groups: list[list[int]] = [[]]
    for part in sorted(sizes, key=lambda part: (part == OUTSIDE, part)):
        if groups[-1] and sum(sizes[p] for p in groups[-1]) + sizes[part] > FILE:
            groups.append([])
        groups[-1].append(part)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write(path: Path, stock: Any, parts: list[int]) -> None:
    """One file, read back and compared bit for bit."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    prefix = layer_prefix(stock)
    tensors = {n: t.contiguous() for n, t in _saved(stock).items() if _part(n, prefix) in parts}
    save_file(tensors, path, metadata={"format": "pt"})
    with safe_open(path, "pt") as file:
        if wrong := [name for name, tensor in tensors.items() if not torch.equal(file.get_tensor(name), tensor)]:
            raise OSError(f"{path.name} reads back otherwise than it was written: {', '.join(wrong[:3])}")


def _write_rest(folder: Path, stock: Any, files: dict[str, list[int]]) -> None:
    """The index and the configs, as `save_pretrained` has them."""
    stock.config.architectures = [type(stock).__name__]
    stock.config.dtype = str(stock.dtype).removeprefix("torch.")
    stock.config.save_pretrained(folder)
    stock.generation_config.save_pretrained(folder)
    if len(files) > 1:
        saved, prefix = _saved(stock), layer_prefix(stock)
        of = {part: file for file, parts in files.items() for part in parts}
        sizes = {
            "total_parameters": stock.num_parameters(),
            "total_size": sum(t.numel() * t.element_size() for t in saved.values()),
        }
        index = {"metadata": sizes, "weight_map": {name: of[_part(name, prefix)] for name in sorted(saved)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _put(model: Any, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        setattr(module, leaf, value)
    else:
        put(model, name, value)
