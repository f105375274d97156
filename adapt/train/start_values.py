"""What the student made of the rows when a stage began: one number for each row the stage will read, kept in the run folder.

The numbers are taken before the first step, in the microbatches that will train on the rows, so that a row is computed
then as it will be in its first step. Once the weights have moved they cannot be had again: a resumed stage goes on with the
kept ones, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapt.config.schema import Recipe
from adapt.data.batch import Batch
from adapt.data.stream import TrainStream, deal
from adapt.distributed import world as worlds
from adapt.distributed.world import World
from adapt.errors import Problem, StopRequested, UserError
from adapt.train.hooks import Hooks
from adapt.train.progress import duration
from adapt.train.root import Root, look
from adapt.train.state import State

FOLDER = "start"
"""Of the run folder; a file for each stage that compares."""
TELL_EVERY = 60
"""Seconds between lines of how far it is."""
Key = tuple[int, int]
"""(source, row)"""


class StartValues:
    """`values(batch)` is the value of each row."""

    def __init__(self, keys: list[Key], values: list[float]):
        self._of = dict(zip(keys, values, strict=True))

    def __len__(self) -> int:
        return len(self._of)

    def __call__(self, batch: Batch) -> Tensor:
        """[B] float64. Raises UserError for a row that was not foreseen."""
        keys = list(zip(batch.source.tolist(), batch.sample_index.tolist(), strict=True))
        self.require(keys)
        return torch.tensor([self._of[key] for key in keys], dtype=torch.float64)

    def require(self, keys: Iterable[Key]) -> None:
        for source, row in keys:
            if (source, row) not in self._of:
                what = (
                    f"row {row:,} of data.train[{source}] was not among the {len(self):,} that the stage was to read, so "
                    "the student was not asked for it at the start, and it has been trained since. For more steps than "
                    "were planned, start a new run (another run.name) from the export of this one"
                )
                raise UserError(Problem("trainer", what))

    def to_bytes(self, facts: dict[str, Any]) -> bytes:
        """A safetensors file, with `facts` for whoever looks at it."""
        from safetensors.numpy import save

        keys = np.array(list(self._of), np.int64).reshape(-1, 2)
        arrays = {"source": keys[:, 0].copy(), "row": keys[:, 1].copy(), "value": np.array([*self._of.values()])}
        return save(arrays, {"adapt": json.dumps(facts)})

    @staticmethod
    def load(file: Path, fingerprint: str) -> StartValues:
        """Raises UserError if the file is not the one with that fingerprint."""
        from safetensors.numpy import load

        content = file.read_bytes() if file.is_file() else None
        if content is None or fingerprint_of(content) != fingerprint:
            state = "is missing" if content is None else "is not the one this stage began with"
            what = (
                f"{file} {state}. It holds what the student made of the data before it was trained, which the loss "
                "compares with and which cannot be computed from the trained weights. Restore the file, or start again "
                "under another run.name"
            )
            raise UserError(Problem("objective", what))
        arrays = load(content)
        keys = zip(arrays["source"].tolist(), arrays["row"].tolist(), strict=True)
        return StartValues(list(keys), arrays["value"].tolist())


def fingerprint_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def place(folder: Path, stage: int) -> Path:
    return folder / FOLDER / f"stage-{stage}.safetensors"


def nothing(batch: Batch) -> Tensor:
    """[B] zeros in the place of values, for the dry run, whose loss nobody sees."""
    return torch.zeros(batch.num_rows, dtype=torch.float64)


def begin(
    recipe: Recipe,
    objective: Any,
    state: State,
    stream: TrainStream,
    steps: int,
    *,
    root: Root,
    microbatch: int,
    world: World,
    hooks: Hooks,
) -> None:
    """Tell the objective what the student was when the stage of `steps` began: measured now, at its first step, or as it
    was kept. Raises StopRequested, or UserError where what was kept is not what is needed. Collective."""
    rows_per_step, file = recipe.trainer.batch_tokens // recipe.data.seq_len, place(hooks.folder.path, state.stage)
    if state.stage_step:
        values = StartValues.load(file, state.start_values)
        positions = range((state.stage_step + state.skipped) * rows_per_step, (steps + state.skipped) * rows_per_step)
        values.require(stream.locate(position)[::2] for position in positions)
        objective.remember(values)
        return
    steps = foreseen(recipe, steps)
    wanted = min(steps * rows_per_step, sum(map(len, stream.rows)))
    hooks.note(f"before the first step: what the student makes of {wanted:,} rows as it is")
    began = told = time.monotonic()

    def show(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            hooks.note(f"{done:,} of {wanted:,} rows after {duration(told - began)}")

    values = measure(
        root,
        objective,
        stream,
        steps,
        rows_per_step=rows_per_step,
        microbatch=microbatch,
        world=world,
        seed=recipe.run.seed,
        stop=hooks.wants_stop,
        show=show,
    )
    if values is None:
        raise StopRequested(
            f"stopped on request ({hooks.flag.reason or 'another rank was asked to stop'}) before the first step of the "
            "stage, while the student was looking at its data; that begins again when you go on with --resume."
        )
    objective.remember(values)
    content = values.to_bytes({"stage": state.stage, "step": state.step, "data": stream.fingerprint})
    worlds.on_main(world, lambda: _write(file, content))
    state.start_values = fingerprint_of(content)
    hooks.note(f"{len(values):,} rows in {duration(time.monotonic() - began)}, kept in {file}")


def foreseen(recipe: Recipe, steps: int) -> int:
    """Steps of data that a stage of `steps` may read: rewinds leave some out and read on behind the last."""
    rewinds = recipe.trainer.max_non_finite if recipe.trainer.non_finite == "rewind" else 0
    return steps + rewinds * (recipe.checkpoint.every or 0)


def measure(
    root: Root,
    objective: Any,
    stream: TrainStream,
    steps: int,
    *,
    rows_per_step: int,
    microbatch: int,
    world: World,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    show: Callable[[int], None] = lambda done: None,
) -> StartValues | None:
    """Ask the student, as it is and without dropout, for the value of every row of the first `steps` steps, each once.
    `show` is told how many there are so far; None if any rank was asked to stop. Collective: a step with any row that is
    new is computed by all ranks, each its part."""
    slots: dict[Key, int] = {}
    mine: list[tuple[int, float]] = []
    if stream.plan.end is not None:
        steps = min(steps, stream.plan.end * stream.unit // rows_per_step)
    everything, training = sum(map(len, stream.rows)), root.training
    root.eval()
    for step in range(steps):
        if len(slots) == everything:
            break
        first, new = step * rows_per_step, set()
        for position in range(first, first + rows_per_step):
            key = stream.locate(position)[::2]
            if key not in slots:
                slots[key] = len(slots)
                new.add(position)
        if not new:
            continue
        if world.sum([int(stop())])[0]:
            return None
        batch = stream.step_batch(step, rows_per_step, world.rank, world.size)
        values = _values(root, objective, batch, microbatch, seed, step, world)
        keys = zip(batch.source.tolist(), batch.sample_index.tolist(), strict=True)
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            if first + deal(index, world.rank, world.size, stream.unit) in new:
                mine.append((slots[key], value))
        show(len(slots))
    root.train(training)
    found = np.zeros(len(slots))
    for slot, value in mine:
        found[slot] = value
    return StartValues(list(slots), world.sum(found.tolist()))


def _values(
    root: Root, objective: Any, batch: Batch, microbatch: int, seed: int, step: int, world: World
) -> list[float]:
    found = []
    for start in range(0, batch.num_rows, microbatch):
        prepared = objective.prepare(batch.rows(start, start + microbatch), seed=seed, step=step)
        found += look(root, objective.row_values, prepared.to(world.device).inputs).double().tolist()
    return found


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except OSError as error:
        raise UserError(
            Problem("run.dir", f"{file} cannot be written: {error.strerror}. Make room, then --resume")
        ) from None
