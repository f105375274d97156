"""`trainer.deterministic`: no operation whose result depends on which thread came first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adapt.errors import Problem, UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""cuBLAS chooses among its streams' workspaces as they come free, unless this names a size (NVIDIA's manual, 2.1.4)."""


def prepare(wanted: bool) -> None:
    """What must be in the environment before CUDA starts, and thus before the processes of the run do."""
    if wanted:
        os.environ.setdefault(WORKSPACE, ":4096:8")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Raises UserError with the operation's name where one has no deterministic form on this device."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    except RuntimeError as error:
        if not (wanted and "deterministic" in str(error)):
            raise
        why = f"an operation of this run has no deterministic form here: {str(error).splitlines()[0]}"
        raise UserError(Problem("trainer.deterministic", f"true: {why}; set it to false")) from None
    finally:
        torch.use_deterministic_algorithms(before)
