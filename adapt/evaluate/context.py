"""What a suite may use: the models, the held-out rows of this rank, sums and work over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from adapt.data.batch import Batch
from adapt.evaluate.bytes import byte_lengths
from adapt.evaluate.grid import Grid
from adapt.generation.contract import Contract
from adapt.objectives.base import Facts

Item, Result = TypeVar("Item"), TypeVar("Result")


class Suite(Protocol):
    """Built by `registry entry(config)`. A config with `metrics(recipe, datasets) -> names` states beforehand what will
    be measured, so that rules which name a metric can be checked; `problems(recipe)` says what cannot work."""

    brings_data: bool = False
    """Whether it can measure where the recipe has no held-out data: it makes its own, or its config names it. (The
    factory is annotated to return a class that says so.)"""

    def __call__(self, context: EvalContext) -> dict[str, float]:
        """Metric name -> value, the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    call: Callable[..., Any]
    """`call(fn, *args)` runs `fn(models, *args)` in the root module, where sharded weights are whole, without
    gradients. Collective: every rank calls equally often."""
    tokenizer: Any
    eval_sets: Mapping[str, Callable[..., Iterator[Batch]]]
    """Dataset label -> a fresh pass over this rank's share of the held-out rows; on every rank equally many batches,
    with rows of padding where it has fewer, so that the models may be called for each. Takes `row_bytes`,
    `byte_lengths`, `row_tokens` and `joined` of adapt.data.stream.eval_batches."""
    pair_sets: Mapping[str, Callable[..., Iterator[Batch]]] = field(default_factory=dict)
    """The same of preference pairs, whose two rows follow each other in a batch. No other suite takes them for text."""
    reduce: Callable[[dict[str, float]], dict[str, float]] = lambda sums: sums
    """Sums of this rank -> sums over all ranks, in float64. Collective."""
    keep: Callable[[Grid], None] = lambda grid: None
    """Keeps a table of cells for the report; what it holds is too much for metrics."""
    facts: Facts
    contract: Contract = field(default_factory=Contract)
    """How the objective or the model decodes blocks; without a block size where it does not."""
    guards: tuple[str, ...] = ()
    """Labels of the held-out sets that must not get worse (`data.eval[].guard`)."""
    start: Mapping[str, float] | None = None
    """What the run measured before its first step: {} where this is that measurement, None where there is no such
    thing, and nothing to compare with."""
    base: Callable[[], AbstractContextManager[Callable[..., Any]]] | None = None
    """Opens the model before its conversions and gives what `call` is for it; None where nobody knows it."""
    measured: list[str] = field(default_factory=list)
    """What was measured of models that do not change (others.py): the same list at every evaluation of a run."""
    say: Callable[[str], None] = lambda text: None
    """Tells the user what is going on, where it takes long."""
    device: torch.device | str = "cpu"
    seed: int = 0

    @property
    def datasets(self) -> list[str]:
        return list(self.eval_sets)

    def batches(self, label: str, row_bytes: int | None = None) -> Iterator[Batch]:
        """`row_bytes`: rows with so many bytes of text instead of `data.seq_len` tokens."""
        if row_bytes is None:
            return self.eval_sets[label]()
        return self.eval_sets[label](row_bytes=row_bytes, byte_lengths=self.byte_lengths.numpy())

    def long_batches(self, label: str, row_tokens: int, joined: bool) -> Iterator[Batch]:
        """Rows of so many tokens, whatever `data.seq_len` is. `joined`: documents of a row are one text."""
        return self.eval_sets[label](row_tokens=row_tokens, joined=joined)

    @cached_property
    def byte_lengths(self) -> Tensor:
        """[V] bytes of text each token stands for (0 for special tokens)."""
        return byte_lengths(self.tokenizer)

    def forgotten(self, metric: str, value: float) -> float | None:
        """How far `metric` rose since the start, 0 at the start itself; None where the start is not known."""
        if self.start is None or (self.start and metric not in self.start):
            return None
        return value - self.start.get(metric, value)

    def num_bytes(self, batch: Batch) -> int:
        """Bytes of the scored tokens."""
        return int(self.byte_lengths[batch.labels[batch.labels != -100]].sum())

    @property
    def rank_and_world(self) -> tuple[int, int]:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(), dist.get_world_size()

    def dealt(self, items: list[Item], work: Callable[[Item], Result]) -> list[Result]:
        """`work(item)` of every item, in order and the same on every rank, each done by one of them. Every rank works
        equally often (on the last item again where there are none left), so `work` may call the models. Collective."""
        rank, world = self.rank_and_world
        turns = range(-(-len(items) // world))
        mine = [work(items[min(turn * world + rank, len(items) - 1)]) for turn in turns]
        by_rank = self.gather(mine)
        return [by_rank[(i % world) * len(turns) + i // world] for i in range(len(items))]

    def gather(self, value: list[Any]) -> list[Any]:
        """The lists of all ranks, one after the other. Collective."""
        import torch.distributed as dist

        _, world = self.rank_and_world
        if world == 1:
            return value
        lists: list[Any] = [None] * world
        dist.all_gather_object(lists, value)
        return [item for part in lists for item in part]


def guard_labels(data: Any, labels: list[str]) -> tuple[str, ...]:
    """Of the labels of `data.eval`, in its order, those of the sets marked `guard`."""
    return tuple(label for label, dataset in zip(labels, data.eval, strict=True) if dataset.guard)
