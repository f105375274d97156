"""What MODEL_OR_RUN names on the command line: a run folder, or anything `model.base` accepts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from adapt.errors import Problem, UserError


@dataclass(frozen=True)
class Opened:
    model: Any
    """A transformers causal LM in eval mode, on the GPU where there is one."""
    tokenizer: Any
    run: Path | None
    """The run folder the model came from."""


def open_model(text: str) -> Opened:
    """Loaded in bfloat16 on a GPU, in float32 on a CPU (where half precision is many times slower)."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from adapt.config.schema import Model, Tokenizer
    from adapt.generation.absorb import absorb
    from adapt.pretrained import load_model, load_tokenizer
    from adapt.pretrained.check import mask_problems

    disable_progress_bar()
    run = Path(text) if (Path(text) / "config.yaml").is_file() else None
    base = text if run is None else str(run / "export")
    if run is not None and not (run / "export" / "config.json").is_file():
        raise UserError(
            f"the run {text} has no export yet: finish it (adapt fit ... --resume), or export its newest checkpoint "
            f"(adapt export {text} --to DIR) and give that folder"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    wanted = SimpleNamespace(model=Model(base=base, dtype=dtype), tokenizer=Tokenizer())
    try:
        model, tokenizer = load_model(wanted, device=device), load_tokenizer(wanted)
        if problems := mask_problems(tokenizer, model.config):
            raise UserError(problems)
        return Opened(absorb(model), tokenizer, run)
    except UserError as error:  # here nobody wrote a recipe with `model.base` in it
        raise UserError([Problem("" if p.where == "model.base" else p.where, p.what) for p in error.problems]) from None


def eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a text, by the generation config, the model's config and the tokenizer."""
    found: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return tuple(sorted(found))
