"""The weights of an export: where they are, and how they get into the folder and are found there again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from adapt.config.schema import Export
from adapt.export.stock import stock_form
from adapt.export.verify import compare, reload
from adapt.pretrained.cache import new_folder
from adapt.pretrained.quiet import quiet

T = TypeVar("T")


class Weights(Protocol):
    """A trained model in some place. All methods are collective where it is on several ranks."""

    def alone(self, work: Callable[[], T]) -> T | None:
        """Do what one process does for all."""

    def stock(self, export: Export, extra_config: dict[str, Any]) -> Any:
        """The module of the stock class that the folder will be read as; on the meta device where it is never whole."""

    def folder(self, target: Path) -> AbstractContextManager[Path]:
        """`new_folder(target)`, the same on all ranks."""

    def write(self, folder: Path, stock: Any) -> None:
        """Weights, config.json and generation_config.json. Raises OSError and safetensors' own."""

    def compare(self, folder: Path, stock: Any, tokenizer: Any) -> dict[str, Any]:
        """Load the folder as a stranger would: raises RuntimeError unless it is the trained model. What was measured."""


class Whole:
    """A plain transformers causal LM on the CPU, adapters merged."""

    def __init__(self, model: Any):
        self.model = model

    def alone(self, work: Callable[[], T]) -> T:
        return work()

    def stock(self, export: Export, extra_config: dict[str, Any]) -> Any:
        return stock_copy(stock_form(self.model, export.target), export.dtype, extra_config)

    def folder(self, target: Path) -> AbstractContextManager[Path]:
        return new_folder(target)

    def write(self, folder: Path, stock: Any) -> None:
        with quiet():
            stock.save_pretrained(folder)

    def compare(self, folder: Path, stock: Any, tokenizer: Any) -> dict[str, Any]:
        return compare(reload(folder, str(stock.dtype)[6:]), stock, trained=self.model, tokenizer=tokenizer)


def stock_copy(model, dtype: str, extra_config: dict[str, Any]):
    """The same weights in `dtype` (those the class keeps in float32 stay there), in a fresh module of the stock class with a clean config; shares what needs no
    cast. (`model.to(dtype)` would round the RoPE frequencies, which loading keeps in float32.)"""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "quantization_config", "dtype")
    }
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    for key, value in extra_config.items():
        setattr(config, key, value)
    torch_dtype = getattr(torch, dtype)
    config.dtype = torch_dtype
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, attn_implementation="sdpa")
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    state = {
        name: w.detach().to(torch.float32 if any(part in wide for part in name.split(".")) else torch_dtype)
        for name, w in model.state_dict().items()
    }
    missing, unexpected = stock.load_state_dict(state, strict=False, assign=True)
    stock.tie_weights()
    if wrong := [*unexpected, *(k for k in missing if dict(stock.named_parameters())[k].is_meta)]:
        names = ", ".join(wrong[:5])
        raise RuntimeError(f"not a plain {type(stock).__name__}: {names} (adapters that were not merged?)")
    theirs = dict(model.named_buffers())
    for name, buffer in list(stock.named_buffers()):
        if buffer.is_meta:  # RoPE frequencies: not part of the state dict
            owner, _, leaf = name.rpartition(".")
            setattr(stock.get_submodule(owner), leaf, theirs[name].detach().clone())
    if model.generation_config is not None:
        stock.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    return stock.eval()
