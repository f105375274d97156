"""Checkpoints written while training goes on: it waits for a copy of what it trains, and the rest is a thread's.

The copy is in the host's memory: weights and optimizer state of this rank's shard once more, held from the first such save
to the end of the stage, so that later saves find their pages (pinned, where there is a GPU). The ranks' threads agree among
themselves over a group of their own. A process that is killed meanwhile leaves a `.partial` folder and the checkpoints
before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adapt.attempts import Attempt
from adapt.distributed.checkpoint import Draft, draft, write
from adapt.distributed.world import World
from adapt.errors import UserError

SLOWEST = timedelta(minutes=30)
"""How long a rank's thread waits for the slowest of the others to write its share."""
PATIENCE_AT_THE_END = 600
"""Seconds that a run which ends by an error leaves to a save under way, where there are other ranks to wait for."""


class Saver:
    """One save at a time. As a context, it ends with the save that is under way."""

    def __init__(self, world: World):
        """Collective."""
        self.world = world
        self._saving: _Saving | None = None
        self._untold: list[_Saving] = []
        self._copies: dict[str, Tensor] = {}
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST) if world.grouped else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._saving is not None:
            self._saving.join(None if self.world.size == 1 else PATIENCE_AT_THE_END)

    @property
    def failed(self) -> bool:
        """Whether the save under way has come to nothing, as far as this rank knows; `finish` raises why."""
        return self._saving is not None and self._saving.error is not None

    def news(self) -> list[str]:
        """A line for each save that is done, once."""
        done = [saving for saving in self._untold if saving.seconds]
        self._untold = [saving for saving in self._untold if not saving.seconds]
        return [saving.line() for saving in done if saving.error is None]

    def save(
        self,
        folder: Path,
        step: int,
        root: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: dict[str, Any],
        *,
        attempt: Attempt | None,
        wait: bool,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Save `folder/step-<step>`: whole when this returns (`wait`), or later, with the values of now. Rank 0 does
        `then` once it is there. Raises the UserError of this save (`wait`) or the one before. Collective."""
        self.finish()
        started = time.perf_counter()
        made = draft(folder, step, root, optimizer, state, attempt=attempt)
        if not wait:
            made = replace(made, tensors=self._copied(made.tensors))
        saving = self._saving = _Saving(made, self.world, self._group, then, started)
        self._untold.append(saving)
        if wait:
            self._copies = {}  # an export may need the room
            saving.run()
            self.finish()
        else:
            saving.waited = time.perf_counter() - started
            saving.start()

    def finish(self) -> None:
        """Wait for the save under way, if any. Raises its UserError, on all ranks alike. Collective."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        if saving.ident is not None:
            saving.join()
        if saving.error is not None:
            raise saving.error

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pinned = self.world.device.type == "cuda"
        try:
            self._copies = {n: _room(t, self._copies.get(n), pinned) for n, t in tensors.items()}
        except RuntimeError as error:
            raise UserError(
                f"no memory for the copy that is written while training goes on: {str(error).splitlines()[0]}\n"
                "Set checkpoint.asynchronous=false (training then waits for every checkpoint) and go on with --resume."
            ) from None
        for name, tensor in tensors.items():
            _local(self._copies[name]).copy_(_local(tensor), non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize(self.world.device)
        return self._copies


class _Saving(threading.Thread):
    def __init__(self, made: Draft, world: World, group: Any, then: Callable[[], None], started: float):
        super().__init__(name=f"checkpoint {made.final.name}", daemon=True)
        self.made, self.world, self.group, self.then, self.started = made, world, group, then, started
        self.error: Exception | None = None
        self.seconds = 0.0
        self.waited: float | None = None

    def run(self) -> None:
        try:
            write(self.made, self.world, self.group, self.then)
        except Exception as error:
            self.error = error
        self.seconds = time.perf_counter() - self.started

    def line(self) -> str:
        took = f"checkpoint {self.made.final.name} saved in {self.seconds:.1f} s"
        return took if self.waited is None else f"{took}, {self.waited:.1f} s of which training waited"


def _room(tensor: Tensor, before: Tensor | None, pinned: bool) -> Tensor:
    """Memory of the host for a tensor like this one (of the same shards): what the save before it had, if it fits."""
    if before is not None and type(before) is type(tensor) and before.dtype == tensor.dtype:
        same = getattr(before, "placements", None) == getattr(tensor, "placements", None)
        if same and before.shape == tensor.shape:
            return before
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned and _local(tensor).numel() > 0, requires_grad=False)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
