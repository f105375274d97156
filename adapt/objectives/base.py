"""What an objective is: two pure functions.

`prepare` runs on the CPU and sees no model: it corrupts, lays out the attention and says how many targets each term
has. The counts of all microbatches and ranks are added up before the first backward, so that the loss

    sum over terms of  weight * sum / (count over all ranks and accumulation)

is divided once, by a number known in advance. `__call__` runs the models and returns the sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapt.data.batch import Batch
from adapt.tokenization.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an objective may know of the student before it sees a batch."""

    mask_token_id: int | None = None
    attention: str = "auto"
    """`model.attention` of the recipe: the backend layouts are turned into."""
    replay: frozenset[int] = frozenset()
    """Indices into `data.train` (values of `batch.source`) of the data marked `replay`."""
    vocabulary: Vocabulary | None = None
    """Which ids are special and which are text; None where a model is only measured."""
    positions: int | None = None
    """Longest row the model has positions for; None: no limit that is known."""
    learning: tuple[int, ...] = ()
    """Layers of the student that can learn from the attention they replace."""
    converted: tuple[int, ...] = ()
    """Layers of the student whose token mixer is not the base's attention."""
    total_steps: int | None = None
    """Optimizer steps of the stage, which ramps span as the schedule does; None outside of training."""


@dataclass(frozen=True)
class Term:
    """One term of the loss: `weight * sum / count`. Terms that share a denominator state the same count."""

    count: int
    weight: float = 1.0
    targets: int | None = None
    """How many targets the sum is over, where that is not `count`: what is logged of the term is their mean."""


@dataclass(frozen=True)
class Prepared:
    inputs: dict[str, Any]
    """Tensors (and attention layouts), moved to the device as they are (anything with a `.to`)."""
    terms: dict[str, Term]
    info: dict[str, float] = field(default_factory=dict)
    """Scalars of the schedule worth logging (block size, mask ratio)."""

    def to(self, device) -> Prepared:
        moved = {k: v.to(device, non_blocking=True) if hasattr(v, "to") else v for k, v in self.inputs.items()}
        return Prepared(moved, self.terms, self.info)


@dataclass(frozen=True)
class Models:
    student: nn.Module
    """A transformers causal LM."""
    teacher: nn.Module | None = None
    """Frozen, in eval mode; there where the objective's `needs_teacher` is true, or a suite's."""
    lockstep: bool = False
    """Whether the teacher is sharded over ranks, which must then all call it equally often."""


class Objective(Protocol):
    """Built by `registry entry(config, facts)`. The entry is annotated to return the objective's own class, so that its
    class attributes are known before anything is built."""

    needs_teacher: bool = False
    """Whether `models.teacher` is read. Where that depends on the config, a property of the config says it."""
    pairs: bool = False
    """Whether it reads preference pairs (`batch.pair_index`), and nothing else; others would learn the rejected
    answers too. Both rows of a pair are then always in one microbatch."""
    compares_with_start: bool = False
    """Whether it compares the student with what it was when the stage began. Then it has, besides,
    `row_values(models, inputs) -> [B]`, called without gradients for every row the stage will read, before its first
    step; and `remember(start)`, where `start(batch) -> [B]` float64 gives these values to `prepare`."""

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        """Pure: the noise is a function of (seed, batch.source, batch.epoch, batch.sample_index); the step enters
        through schedules only."""

    def __call__(self, models: Models, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Term name -> sum over this microbatch's targets: scalar, fp32, on the device, differentiable."""

    def largest_step(self) -> int:
        """A step at which the objective needs the most memory; the dry run prepares its batch for it."""

    def observe(self, results: dict[str, float]) -> dict[str, Any]:
        """Told the metrics of every evaluation, the same on all ranks. Returns plain numbers that checkpoints keep and
        `restore(numbers)` gets back on resume; {} where evaluations change nothing."""

    def restore(self, state: dict[str, Any]) -> None: ...

    def export_fields(self) -> dict[str, Any]:
        """What decoding has to know of this objective (`block_size`, `mask_token_id`, ...): goes into the exported
        config, and `block_size` is where suites measure."""


class Stateless:
    """What an objective says that is the same at every step and after every evaluation, and that decoding need not know."""

    def largest_step(self) -> int:
        return 0

    def observe(self, results: dict[str, float]) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """There is nothing to go on from."""

    def export_fields(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Targets:
    """Supervised tokens of a batch as flat indices, so that no kernel waits for a boolean mask's size.

    row, col [N] int64: where each target stands; ids [N] its token; weight [N] fp32, or None where all are 1.
    """

    row: Tensor
    col: Tensor
    ids: Tensor
    weight: Tensor | None

    @staticmethod
    def of(batch: Batch, where: Tensor | None = None) -> Targets:
        """All tokens with a label; `where` [B, T] bool narrows them."""
        chosen = batch.labels != -100 if where is None else (batch.labels != -100) & where
        row, col = chosen.nonzero(as_tuple=True)
        weight = batch.loss_weight[row, col]
        return Targets(row, col, batch.labels[row, col], None if bool((weight == 1).all()) else weight)


def flat_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """hidden [B, S, C], flat index [N] into B*S -> [N, C]."""
    return torch.index_select(hidden.flatten(0, 1), 0, index)
