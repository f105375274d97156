"""Prompts of unequal length as one left-padded batch, and the masks that keep its rows apart from their
padding.

Legend: R rows, S tokens in the cache (padding included), W new tokens of a forward.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapt.errors import Problem, UserError
from adapt.generation.base import Event, Generation
from adapt.generation.stop import Stop


@dataclass
class Row:
    """One prompt and what became of it."""

    number: int
    prompt: list[int]
    limit: int
    """New tokens at most: what was asked for, or what the model has positions for."""
    capped: bool
    """Whether the model's positions set the limit."""
    eos: frozenset[int]
    rng: torch.Generator
    on_event: object = None
    stop: Stop | None = None
    text: str | None = None
    """The text of `tokens`, where stop strings have it decoded."""
    told: int = 0
    """Tokens a `commit` event has been about: with stop strings, no more than are sure to stay."""
    tokens: list[int] = field(default_factory=list)
    order: list[tuple[int, int]] = field(default_factory=list)
    forwards: int = 0
    started: float = field(default_factory=time.perf_counter)
    result: Generation | None = None

    def uniform(self, count: int) -> Tensor:
        """[count] fp64, drawn on the CPU so that every device samples the same text."""
        return torch.rand(count, generator=self.rng, dtype=torch.float64)

    def reveal(self, positions: list[int], tokens: list[int], step: int) -> None:
        self.order += [(p, step) for p in positions]
        self._tell("reveal", positions, tokens, step)

    def commit(self, tokens: list[int]) -> None:
        """Append final text, up to and including the first EOS; the row is finished there, at a stop string or at its
        limit."""
        end = next((i + 1 for i, t in enumerate(tokens) if t in self.eos), None)
        self.tokens += tokens[:end]
        sure = len(self.tokens)
        if self.stop is not None:
            self.text = self.stop.decode(self.tokens)
            at = self.stop.found(self.text)
            if at is not None:
                self._cut(at)
                return
            sure = max(self.told, self.stop.whole(self.tokens, self.text, self.stop.sure(self.text)))
        self._tell_commit(sure)
        if end is not None:
            self.finish("eos")
        elif len(self.tokens) >= self.limit:
            self.finish("context" if self.capped else "length")

    def _cut(self, at: int) -> None:
        del self.tokens[self.stop.whole(self.tokens, self.text, at) :]
        self.text = self.text[:at]
        self.finish("stop")

    def finish(self, why: str) -> None:
        self._tell_commit(len(self.tokens))
        order = [(p, s) for p, s in self.order if p < len(self.tokens)]
        seconds = time.perf_counter() - self.started
        self.result = Generation(self.tokens, self.forwards, order, why, seconds, self.text)

    def _tell_commit(self, until: int) -> None:
        first, self.told = self.told, until
        self._tell("commit", range(first, until), self.tokens[first:until], 0)

    def _tell(self, kind, positions, tokens, step) -> None:
        if self.on_event is not None and tokens:
            self.on_event(Event(kind, tuple(positions), tuple(tokens), step, self.number))


def open_rows(
    model: nn.Module, prompts, *, max_new_tokens: int, eos_ids, seed: int, on_event=None, stop: Stop | None = None
) -> list[Row]:
    """Checked rows, those with nothing to do already finished."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens} is negative; how many tokens should follow?")
    context = getattr(model.config, "max_position_embeddings", None)
    every = [_ids(prompt) for prompt in prompts]
    problems = [
        Problem(f"prompt {number}" if len(every) > 1 else "", what)
        for number, ids in enumerate(every)
        for what in _problems(ids, model.config.vocab_size, context)
    ]
    if problems:
        raise UserError(problems)
    rows = []
    for number, ids in enumerate(every):
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
        rng = torch.Generator().manual_seed(seed + number)
        row = Row(number, ids, room, room < max_new_tokens, frozenset(eos_ids), rng, on_event, stop)
        if room == 0:
            row.finish("length")
        rows.append(row)
    return rows


def _ids(prompt: Sequence[int] | Tensor) -> list[int]:
    if isinstance(prompt, Tensor):
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1:
            raise ValueError(f"a prompt is [T] token ids, got shape {list(prompt.shape)}; use generate_batch for more")
        prompt = prompt.tolist()
    return [int(i) for i in prompt]


def _problems(ids: list[int], vocab: int, context: int | None) -> Iterator[str]:
    if not ids:
        yield "the prompt is empty, and a model needs a token to start from: give the BOS token or some text"
        return
    if not 0 <= min(ids) <= max(ids) < vocab:
        yield (
            f"the prompt holds token id {max(max(ids), -min(ids)):,d}, the model knows 0 to {vocab - 1:,d}: "
            f"the tokenizer does not belong to this model"
        )
    if context is not None and len(ids) >= context:
        yield (
            f"the prompt has {len(ids):,d} tokens and the model's context is {context:,d} "
            f"(max_position_embeddings): shorten the prompt by at least {len(ids) - context + 1:,d} tokens"
        )


@dataclass
class Padded:
    """Left-padded prompts: every row's text ends in the same column, so the rows go on in step."""

    ids: Tensor
    """[R, S] int64."""
    real: Tensor
    """[R, S] bool; False is padding."""

    @staticmethod
    def of(rows: list[Row], device: torch.device, lengths: Sequence[int] | None = None) -> Padded:
        """`lengths`: how much of each prompt (None: all of it)."""
        lengths = [len(r.prompt) for r in rows] if lengths is None else lengths
        longest = max(lengths)
        ids = [[r.prompt[0]] * (longest - n) + r.prompt[:n] for r, n in zip(rows, lengths, strict=True)]
        start = longest - torch.tensor(lengths, device=device)
        real = torch.arange(longest, device=device) >= start[:, None]
        return Padded(torch.tensor(ids, dtype=torch.long, device=device), real)

    @property
    def positions(self) -> Tensor:
        """[R, S] position of each token in its own text; padding sits at 0."""
        return (self.real.cumsum(1) - 1).clamp_(min=0)


def visible(real: Tensor, width: int, *, causal: bool, used: Tensor | None = None) -> Tensor:
    """[R, 1, W, S + W] bool: W new tokens see the real ones of S cached tokens and each other: causally, or
    all.

    real [R, S] bool. `used` [R, W] bool: new slots that exist in the row (None: all). A slot always sees
    itself, so that no softmax is over nothing.
    """
    rows, device = real.shape[0], real.device
    new = torch.ones(width, width, dtype=torch.bool, device=device)
    new = (new.tril() if causal else new).expand(rows, width, width)
    if used is not None:
        new = (new & used[:, None, :]) | torch.eye(width, dtype=torch.bool, device=device)
    old = real[:, None, :].expand(rows, width, real.shape[1])
    return torch.cat([old, new], 2)[:, None]


def as_mask(model: nn.Module, seen: Tensor) -> Tensor:
    """A bool mask in the form the model's attention takes. `eager` adds its mask to the scores, where a bool
    one would silently be wrong."""
    if model.config._attn_implementation == "eager":
        return torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill_(
            ~seen, torch.finfo(model.dtype).min
        )
    return seen


@contextmanager
def decoding(model: nn.Module):
    """Evaluation mode without gradients; the mode comes back afterwards. (Not inference mode: FSDP2
    cannot.)"""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
