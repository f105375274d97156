"""What a sampler is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adapt.generation.rows import Row


@dataclass(frozen=True)
class Event:
    """Something a reader may watch. Each new token is revealed once and committed once, commits from left to
    right."""

    kind: Literal["reveal", "commit"]
    """`reveal`: a slot was written and stays (in block diffusion in any order). `commit`: final text."""
    positions: tuple[int, ...]
    """Indices into the new tokens, from 0. Revealed positions behind an EOS or a stop string are never committed."""
    tokens: tuple[int, ...]
    step: int
    """Denoising step of the block that revealed them; 0 is the AR head."""
    row: int = 0


@dataclass(frozen=True)
class Generation:
    tokens: list[int]
    """The new tokens, up to and including the first EOS; those that lie wholly before a stop string."""
    forwards: int
    """Forward passes this row took part in, prefill and commits included."""
    reveal_order: list[tuple[int, int]]
    """(index into `tokens`, denoising step within its block) in the order of revelation; step 0 is the AR
    head."""
    stopped_by: Literal["eos", "stop", "length", "context"]
    """`stop`: a stop string; `context`: the model has no positions left."""
    seconds: float
    """Wall time until this row was finished."""
    text: str | None = None
    """With stop strings: the new text, which ends before the first of them, be it in the middle of a token. None
    without."""

    @property
    def tokens_per_forward(self) -> float:
        return len(self.tokens) / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


class Sampler(Protocol):
    """Built by `registry entry(config)`; holds settings only, so one sampler serves any model."""

    def generate(
        self,
        model: nn.Module,
        input_ids: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        seed: int = 0,
        on_event: Callable[[Event], None] | None = None,
    ) -> Generation:
        """Continue one prompt, [T] ids. The text ends before the first of the strings `stop`, which are looked for in
        what `decode` makes of the new tokens."""

    def generate_batch(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int] | Tensor],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        decode: Callable[[list[int]], str] | None = None,
        seed: int = 0,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[Generation]:
        """Continue prompts of any lengths together. Row i decodes as it would alone with `seed + i`."""


class BatchSampler:
    """What all our samplers share: checked rows go in, finished rows come out; `generate` is a batch of one."""

    def plan(self, model: nn.Module, eos_ids: Sequence[int]) -> Any:
        """What `decode` needs to know of the model; refuses one that it cannot serve."""
        return None

    def decode(self, model: nn.Module, rows: list[Row], plan: Any) -> None:
        """Finish every row (there is at least one)."""
        raise NotImplementedError

    def generate(self, model, input_ids, **options) -> Generation:
        return self.generate_batch(model, [input_ids], **options)[0]

    def generate_batch(
        self, model, prompts, *, max_new_tokens, eos_ids=(), stop=(), decode=None, seed=0, on_event=None
    ) -> list[Generation]:
        from adapt.generation.rows import decoding, open_rows
        from adapt.generation.stop import Stop

        stop = Stop.of(stop, decode)
        plan = self.plan(model, eos_ids)
        everyone = open_rows(
            model, prompts, max_new_tokens=max_new_tokens, eos_ids=eos_ids, seed=seed, on_event=on_event, stop=stop
        )
        rows = [r for r in everyone if r.result is None]
        if rows:
            with decoding(model):
                self.decode(model, rows, plan)
        return [r.result for r in everyone]
