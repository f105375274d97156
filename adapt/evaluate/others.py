"""Models that a suite measures beside the student, to tell what its answers are worth.

    teacher   the base before the conversions
    window    the same, each converted layer seeing no more tokens than its KV cache could hold in the bytes of the
              student's recurrent state: what simply forgetting the past comes to. The state counts in float32 and the
              cache in bfloat16, as both are kept while decoding; layers that kept their attention see everything.

They do not change in a run, so each is measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from adapt.errors import Problem, UserError

if TYPE_CHECKING:
    from adapt.evaluate.context import EvalContext

Other = Literal["teacher", "window"]
STATE_BYTES, CACHE_BYTES = 4, 2
"""Of a number: recurrent states are float32, a KV cache is bfloat16."""


def others(context: EvalContext, compare: tuple[Other, ...], asked: str) -> Iterator[tuple[str, str, EvalContext]]:
    """(name, what the report calls it, the context with it in the student's place) of each. `asked` says in full what is
    measured: what the run has measured before is left out. Collective."""
    missing = [name for name in compare if f"{name}: {asked}" not in context.measured]
    if not missing:
        return
    if context.base is None:
        raise UserError(
            f"compare: {', '.join(missing)}: nothing says what this model was before its conversions; give the recipe it "
            "was made with (-c RECIPE), or leave `compare` out"
        )
    windows = context.call(state_sized_windows) if "window" in missing else {}
    with context.base() as call:
        models = {"teacher": ("teacher", call), "window": (window_title(windows), partial(_within, call, windows))}
        for name in missing:
            title, called = models[name]
            yield name, title, replace(context, call=called)
            context.measured.append(f"{name}: {asked}")


def state_sized_windows(models: Any) -> dict[int, int]:
    """Layer -> tokens, for each layer of the student that keeps a state. Raises UserError where none does."""
    import torch

    from adapt.generation.rows import device_of
    from adapt.models.state_cache import StateLayer

    student = models.student
    token = torch.zeros(1, 1, dtype=torch.long, device=device_of(student))
    cache = student(input_ids=token, use_cache=True, logits_to_keep=1).past_key_values
    config = student.config
    a_token = 2 * CACHE_BYTES * config.num_key_value_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )  # fmt: skip
    found = {
        i: max(1, layer.numel() * STATE_BYTES // a_token)
        for i, layer in enumerate(cache.layers)
        if isinstance(layer, StateLayer)
    }
    if not found:
        raise UserError(
            "compare: window is as large as the state of recurrent layers, and this model has none; leave it out"
        )
    return found


def window_title(windows: dict[int, int]) -> str:
    sizes = sorted({*windows.values()}) or [0]
    return f"window of {' to '.join(f'{n:,}' for n in (sizes[0], sizes[-1])[: len(sizes)])} tokens"


def _within(call: Callable[..., Any], windows: dict[int, int], fn: Callable[..., Any], *args: Any) -> Any:
    from adapt.models.window import windowed

    def look(models: Any, *args: Any) -> Any:
        with windowed(models.student, windows):
            return fn(models, *args)

    return call(look, *args)


def compare_problems(suite: str, compare: tuple[Other, ...], recipe: Any) -> Iterator[Problem]:
    if len(set(compare)) < len(compare):
        yield Problem("", f"{suite}: compare={list(compare)} names a model twice")
    if compare and not recipe.model.conversions:
        yield Problem(
            "", f"{suite} compares with the model before its conversions, and model.conversions is empty: leave "
            f"`compare` out (step 0 shows the base)"
        )  # fmt: skip
    elif "window" in compare and not any(c.declares("transfers") for c in recipe.model.conversions):
        yield Problem(
            "", f"{suite} compares with a window as large as the state of recurrent layers, and no conversion here makes "
            f"any (lawcat and mamba2 do): leave `window` out of `compare`"
        )  # fmt: skip
