"""A run's own checkpoints: torch.distributed.checkpoint, whole or not there at all, loadable on any number of ranks.

A checkpoint is a folder `step-N` with the sharded tensors, `state.json` (the numbers) and the sums of its files. It is
written under another name and renamed when complete on all ranks. Only tensors go through DCP, so nothing in it needs unpickling but DCP's
own index (adapt.distributed.index).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from adapt.attempts import Attempt
from adapt.distributed.checksums import SummingWriter, damage_of, put, put_sums, sync_folder
from adapt.distributed.index import Reader
from adapt.distributed.world import World, together
from adapt.errors import UserError
from adapt.optim.suite import algorithms, restart

STATE = "state.json"
ALGORITHMS = "optimizer.json"
"""Which algorithm has made each parameter's state: two of them may well use the same keys."""


@dataclass(frozen=True)
class Draft:
    """A checkpoint about to be written."""

    final: Path
    step: int
    tensors: dict[str, torch.Tensor]
    texts: dict[str, str]
    """File -> what rank 0 writes into it."""
    attempt: Attempt | None = None
    """Whose it is: one that has been superseded writes nothing."""

    @property
    def partial(self) -> Path:
        """Where it is written first; no other attempt's ranks write there."""
        of = "" if self.attempt is None else f".{self.attempt.generation}"
        return self.final.with_name(f".partial-{self.final.name}{of}")

    def check(self) -> None:
        """Raises Superseded."""
        if self.attempt is not None:
            self.attempt.check()


def draft(
    folder: Path,
    step: int,
    root: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    name: str | None = None,
    attempt: Attempt | None = None,
) -> Draft:
    """`folder/step-<step>`, or `folder/<name>`, which is never pruned. Its tensors are those that train."""
    texts = {ALGORITHMS: json.dumps(algorithms(root, optimizer), indent=1), STATE: json.dumps(state, indent=1)}
    return Draft(folder / (name or f"step-{step}"), step, _tensors(root, optimizer), texts, attempt)


def save(
    folder: Path,
    step: int,
    root: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    world: World,
    name: str | None = None,
    attempt: Attempt | None = None,
) -> Path:
    """Draft and write while everything waits (adapt.distributed.saver: while training goes on)."""
    return write(draft(folder, step, root, optimizer, state, name, attempt), world)


def write(
    made: Draft, world: World, group: dist.ProcessGroup | None = None, then: Callable[[], None] = lambda: None
) -> Path:
    """From all ranks, which agree over `group`; rank 0 does `then` at the end. Raises UserError (disk full, read-only) on
    all of them and Superseded (a newer attempt has the run folder), with the checkpoints before it intact."""
    partial = made.partial
    made.check()

    def write_share() -> dict[str, str]:
        writer = SummingWriter(partial)
        try:
            dcp.save(made.tensors, storage_writer=writer, process_group=group, no_dist=not world.grouped)
        except dcp.api.CheckpointException as failure:
            raise RuntimeError(_reason(failure)) from None
        texts = made.texts if world.main else {}
        return writer.sums | {name: put(partial / name, text) for name, text in texts.items()}

    try:
        together(lambda: _remove(partial) if world.main else None, group)
        shares = together(write_share, group)
        together(lambda: _finish(made, shares, then) if world.main else None, group)
    except (OSError, RuntimeError) as failure:
        if world.main:
            _remove(partial)
        raise UserError(
            f"the checkpoint of step {made.step} could not be written to {made.final.parent}: {failure}\n"
            f"The checkpoints before it are intact. Make room (or point run.dir elsewhere) and go on with --resume."
        ) from None
    return made.final


def _reason(failure: Exception) -> str:
    """In words: DCP's own text is a traceback of every rank that failed."""
    if not isinstance(failure, dcp.api.CheckpointException):
        return str(failure)
    told = dict.fromkeys(str(error) or type(error).__name__ for error, _ in failure.failures.values())
    return "; ".join(told)


def _finish(made: Draft, shares: list[dict[str, str]], then: Callable[[], None]) -> None:
    """Rank 0, when all is written: the one place where a checkpoint comes to be."""
    made.check()
    partial, final = made.partial, made.final
    put_sums(partial, {name: digest for share in shares for name, digest in share.items()})
    sync_folder(partial)
    made.check()
    replaced = final.with_name(f".replaced-{final.name}")
    _remove(replaced)
    if final.exists():  # moved aside, not deleted: between any two of these lines one of them is whole
        os.replace(final, replaced)
    os.replace(partial, final)
    sync_folder(final.parent)
    _remove(replaced)
    then()


def _remove(path: Path) -> None:
    """A folder and what is in it; of a link (run folders come from elsewhere, too) the link only."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def recover(folder: Path) -> None:
    """Clean up after a save that was killed: take back a checkpoint it had moved aside, delete what is incomplete."""
    for replaced in folder.glob(".replaced-step-*"):
        final = folder / replaced.name.removeprefix(".replaced-")
        if final.exists():
            _remove(replaced)
        else:
            os.replace(replaced, final)
    for partial in folder.glob(".partial-*"):
        _remove(partial)


def load(path: Path, root: nn.Module, optimizer: torch.optim.Optimizer | None, *, verify: bool = True) -> None:
    """Fill model and optimizer from a checkpoint of any world size. Nothing is touched before its files were verified
    (`adapt.distributed.healthy.newest` has done so already). Collective. Raises UserError where they are damaged."""
    if verify and (wrong := damage_of(path)):
        raise UserError(f"checkpoint {path} is damaged: {wrong}. Bring it back from a copy, or go on without it.")
    reader = Reader(str(path))
    try:
        saved = reader.read_metadata().state_dict_metadata
        if not any(name.startswith("optimizer/") for name in saved):
            if optimizer is not None:
                restart(optimizer)  # saved before its first step
            optimizer = None
        tensors = _tensors(root, optimizer, filling=True)
        of = {n.rpartition("/")[0] for n in saved}
        thawed = {n for n in tensors if n.startswith("optimizer/") and n.rpartition("/")[0] not in of}
        tensors = {n: t for n, t in tensors.items() if n not in thawed}
        if optimizer is not None:
            _refuse_another(path, root, optimizer, tensors, saved)
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (
        dcp.api.CheckpointException,
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(
            f"checkpoint {path} cannot be read: {_reason(error)}\nDelete that folder to resume from the one before it."
        ) from None
    if optimizer is not None:
        whole = get_optimizer_state_dict(root, optimizer)
        for name, entries in whole["state"].items():
            entries.update((key, tensors.get(f"optimizer/{name}/{key}", empty)) for key, empty in entries.items())
        set_optimizer_state_dict(root, optimizer, whole)
        for name, parameter in root.named_parameters():  # frozen when this was saved: it has no moments yet
            if any(n.startswith(f"optimizer/{name}/") for n in thawed):
                restart(optimizer, parameter)


def _refuse_another(path: Path, root: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict, saved: dict) -> None:
    """Raises UserError where a parameter's state was made by another algorithm, or has another shape."""
    file = path / ALGORITHMS
    wrote, wanted = json.loads(file.read_text()) if file.is_file() else {}, algorithms(root, optimizer)
    where = f"the optimizer's state in {path}"
    back = "Select that one again, or start a new run from the weights (model.base: the export)."
    for name, algorithm in wanted.items():
        prefix = f"optimizer/{name}/"
        theirs = {n for n in saved if n.startswith(prefix)}
        if not theirs:
            continue  # frozen when this was saved
        other = wrote.get(name, algorithm)
        if other != algorithm or theirs != {n for n in tensors if n.startswith(prefix)}:
            kind = repr(other) if other != algorithm else "another optimizer"
            raise UserError(f"{where} was made by {kind}; {algorithm!r} cannot go on from it at {name}. {back}")
        for key in sorted(theirs):
            have, want = tuple(getattr(saved[key], "size", ())), tuple(tensors[key].shape)
            if have != want:
                entry = key.removeprefix(prefix)
                raise UserError(
                    f"{where} has a {entry} of {have} for {name}, and this recipe's {algorithm} needs {want}: its rank, "
                    f"split or side was changed. Set it back, or start a new run from the weights."
                )


def read_state(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / STATE).read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no numbers by name")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {path} has no readable {STATE} ({error}); delete that folder and resume") from None


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def prune(folder: Path, keep: int, protect: set[str]) -> None:
    """Delete all but the newest `keep`, the protected ones (best) and, always, the newest."""
    for path in checkpoints(folder)[: -max(1, keep)]:
        if path.name not in protect:
            doomed = folder / f".partial-{path.name}"  # one that is half deleted must not look whole
            _remove(doomed)
            os.replace(path, doomed)
            _remove(doomed)


def _tensors(
    root: nn.Module, optimizer: torch.optim.Optimizer | None, *, filling: bool = False
) -> dict[str, torch.Tensor]:
    """Flat name -> tensor. A tied parameter appears once; a teacher is no part of the root's state. `filling`: the
    tensors are about to be read into, so an optimizer without state gets some (torch makes an empty step for it)."""
    tensors = {f"model/{n}": p.detach() for n, p in root.named_parameters()}
    tensors |= {f"buffer/{n}": b for n, b in root.student.named_buffers() if n in root.student.state_dict()}
    if optimizer is not None and (optimizer.state or filling):
        for name, entries in get_optimizer_state_dict(root, optimizer)["state"].items():
            tensors |= {f"optimizer/{name}/{key}": value for key, value in entries.items()}
    return tensors
