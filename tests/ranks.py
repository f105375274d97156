"""Several processes in one test: a function of a module runs on every rank of a gloo group."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def on_ranks(ranks: int, folder: Path, function: Callable[..., None], *args: Any) -> None:
    """Call `function(*args)` on `ranks` processes; an exception on one of them (an assertion, say) is raised here."""
    store = folder / f"{function.__name__}-{ranks}.store"
    multiprocessing.spawn(_rank, (ranks, store, function, args), nprocs=ranks)


def _rank(rank: int, ranks: int, store: Path, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
