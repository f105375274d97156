"""Which checkpoint to go on from: the newest one that holds what was written to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from adapt.distributed.checkpoint import checkpoints
from adapt.distributed.checksums import SUMS, damage_of
from adapt.distributed.world import World, from_main, on_main
from adapt.errors import UserError


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest healthy checkpoint, and what is wrong with each that is newer; None where there is no checkpoint at all.
    Collective. Raises UserError where all of them are damaged."""
    damaged: dict[Path, str] = {}
    for name in reversed(from_main([path.name for path in checkpoints(folder)])):
        if not (wrong := damage_of(folder / name)):
            return folder / name, damaged
        damaged[folder / name] = wrong
    if damaged:
        raise UserError(
            "no checkpoint is left that holds what was written to it:\n"
            + "\n".join(f"  {path}: {wrong}" for path, wrong in damaged.items())
            + "\nBring one of them back from a copy, or start a new run under another run.name."
        )
    return None, {}


def take_newest(folder: Path, world: World, tell: Callable[[str], None]) -> Path | None:
    """The same for a run that goes on from there. Damaged ones are moved out of its way, not deleted, so that none is
    taken for a checkpoint or counts as one that is kept; `tell` is called on all ranks. Collective."""
    found, damaged = newest(folder)
    on_main(world, lambda: [_set_aside(path) for path in damaged])
    for path, wrong in damaged.items():
        tell(
            f"warning: checkpoint {path.name} is damaged: {wrong}. It is called damaged-{path.name} now, for you to look "
            f"at or delete; going on from {found.name if found else 'the start'}"
        )
    if found and not (found / SUMS).is_file():
        tell(
            f"note: checkpoint {found.name} has no {SUMS} (an earlier adapt wrote it), so its files are taken as they are"
        )
    return found


def _set_aside(path: Path) -> None:
    before = sum(1 for _ in path.parent.glob(f"damaged-{path.name}*"))
    os.replace(path, path.with_name(f"damaged-{path.name}" + (f".{before}" if before else "")))
