"""However a run ends, its attempt's history and the other ranks are told how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed.checkpoint as dcp

from adapt.distributed import world as worlds
from adapt.distributed.world import Failed, World
from adapt.errors import RunLost, StopRequested, UserError
from adapt.runfolder import RunFolder

ERRORS = (RuntimeError, dcp.api.CheckpointException)
"""Collectives raise RuntimeErrors when a rank is missing, besides much else."""


@contextmanager
def outcome(folder: RunFolder, world: World) -> Iterator[None]:
    """Around the run. An error of a collective is raised as RankLost with the ranks that are missing."""

    def tell(code: int, reason: str) -> None:
        if folder.attempt is not None:
            folder.attempt.end(code, reason)

    worlds.on_loss(world, tell)
    code, how, left = 1, "", "done"
    try:
        yield
        code, how = 0, "done"
    except StopRequested as stop:
        code, how, left = stop.exit_code, str(stop), "stopped"
        raise
    except SystemExit:
        code, how = 2, "an error of the user's, told by rank 0"
        raise
    except (UserError, *ERRORS) as error:
        told = _explained(error, world)
        code, how = getattr(told, "exit_code", 1), _short(told)
        left = how
        if told is error:
            raise
        raise told from None
    except BaseException as error:
        code, how = getattr(error, "exit_code", 1), _short(error)
        left = how
        raise
    finally:
        tell(code, how)
        if world.watch is not None:
            world.watch.leave(left)


def _explained(error: Exception, world: World) -> Exception:
    """A missing rank may also be behind a user's error: of a checkpoint that it did not help to read, say."""
    if world.watch is None or not (_may_be_of_the_lost(error) or _may_be_of_the_lost(error.__context__)):
        return error
    return world.watch.explain(error)


def _may_be_of_the_lost(error: BaseException | None) -> bool:
    """Not what all ranks have told each other: each of them ends with it, and soon, so it would be taken for missing."""
    return isinstance(error, RuntimeError) and not isinstance(error, Failed)


def _short(error: BaseException) -> str:
    text = str(error).partition("\n")[0][:500]
    return text if isinstance(error, UserError | RunLost) else f"{type(error).__name__}: {text}"
