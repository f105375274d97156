"""Checks before the first step: packed documents do not see each other, and the largest batch fits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapt.data.batch import Batch
from adapt.distributed.world import World
from adapt.errors import Problem, UserError
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Models, Objective
from adapt.train.root import Root, look
from adapt.train.step import gradients

LEAKY = " Its attention does not honour the layout, so training on packed rows would be wrong"


def leak_probe(root: Root, backend: str, vocab: int, world: World) -> float:
    """Pack two documents and look at the hidden states of the second, in training and in eval mode: no change in the
    first may move them, and they must be those of the second document alone. Returns the largest difference.

    Runs the model at hand with the attention at hand, so a family that ignores the layout is found here. It runs with
    `data.cross_document_attention`, too: held-out documents and padding are always apart.
    """
    first, second = 11, 13
    doc = (torch.arange(first + second) >= first).long()[None]
    pos = torch.cat([torch.arange(first), torch.arange(second)])[None]
    ids = (torch.arange(first + second) * 7 + 3)[None] % vocab
    changed = torch.where((doc == 0) & (pos == 0), (ids + 11) % vocab, ids)  # all of the first document depends on it
    alone = torch.cat([ids[:, first:], ids[:, :first]], 1), 1 - doc.roll(-first, 1), pos.roll(-first, 1)
    behind = (torch.arange(first + second) >= first).repeat(2)  # the second document, in both streams
    ahead = (torch.arange(first + second) < second).repeat(2)  # where it is when it comes first

    def run(models: Models, *inputs: Any):
        return attention.hidden_states(models.student, *inputs, backend)

    def states(ids: Tensor, doc: Tensor, pos: Tensor) -> Tensor:
        layout = Layout.noisy_then_clean(doc, pos, pos // 4)
        moved = [x.to(world.device) for x in (torch.cat([ids, ids], 1), torch.cat([pos, pos], 1), layout)]
        torch.manual_seed(0)  # the same dropout every time
        return look(root, run, *moved)[0]

    training, found = root.training, []
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        for mode in (False, True):
            root.train(mode)
            packed = states(ids, doc, pos)
            size = float(packed[behind].float().abs().max())
            exact = packed.dtype in (torch.float32, torch.float64)
            change = (packed - states(changed, doc, pos)).abs().float().amax(-1).cpu()
            leak = float(change[behind].max())
            honoured = leak <= 1e-3 * size
            found.append(leak)
            if not mode:  # where dropout is drawn depends on where the document is, so only without it
                apart = float((packed[behind] - states(*alone)[ahead]).abs().max())
                honoured = honoured and apart <= (1e-4 if exact else 5e-2) * max(1.0, size)
                found.append(apart)
                if float(change[~behind].min()) == 0.0:
                    raise UserError(Problem("model.base", f"this model's attention does not attend.{LEAKY}"))
            if not honoured:  # NaN is not honoured either
                difference = max(found, key=lambda x: (x != x, x))
                raise UserError(
                    Problem(
                        "model.base",
                        f"packed documents see each other in this model in {'training' if mode else 'eval'} mode (packing, "
                        f"or a change in one, moved the next one's hidden states by {difference:.2e}).{LEAKY}",
                    )
                )
    root.train(training)
    return max(found)


def dry_run(
    root: nn.Module,
    objective: Objective,
    batch: Batch,
    *,
    microbatch: int | str,
    seed: int,
    world: World,
    unit: int = 1,
) -> tuple[int, float]:
    """Forward and backward of the largest microbatch the run will see, of whole units of `unit` rows. Returns
    (microbatch, seconds it took).

    `auto` takes what should fit: on GPUs by the measured memory of one and two rows, on CPUs by the shapes. It is the
    same on all ranks, and tried once: a rank that ran out of memory inside a collective cannot be called back.
    """
    rows = batch.num_rows

    def attempt(size: int) -> float:
        started = time.perf_counter()
        try:
            gradients(
                root,
                objective,
                batch.rows(0, size),
                microbatch=size,
                seed=seed,
                step=objective.largest_step(),
                world=world,
                clip=None,
            )
        except torch.OutOfMemoryError:
            raise UserError(out_of_memory(size, batch.input_ids.shape[1])) from None
        root.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    if isinstance(microbatch, int):
        size = min(rows, microbatch)
    elif world.device.type == "cuda":
        size = world.least(_measured(attempt, root, rows, world.device, unit))
    else:
        size = world.least(min(rows, max(unit, _guess(root, batch, world) // unit * unit)))
    return size, attempt(size)


def out_of_memory(rows: int, length: int) -> Problem:
    return Problem(
        "trainer.microbatch",
        f"{rows} row(s) of {length} tokens do not fit into this device's memory; lower trainer.microbatch or "
        "data.seq_len, set trainer.activation_checkpointing=true, or use more ranks",
    )


def _measured(attempt: Callable[[int], float], root: nn.Module, rows: int, device: torch.device, unit: int = 1) -> int:
    """Rows that fit a GPU, in whole units, from the peaks of one and of two units. Collective."""
    peaks = []
    for size in (unit, min(2 * unit, rows)):
        torch.cuda.reset_peak_memory_stats(device)
        attempt(size)
        peaks.append(torch.cuda.max_memory_allocated(device))
    local = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in root.parameters() if p.requires_grad)
    room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return unit * rows_that_fit(peaks[0], peaks[1], room, 3 * local, rows // unit)


def rows_that_fit(one: int, two: int, room: int, to_come: int, rows: int) -> int:
    """Bytes: peaks of one and two rows, what the device has room for, and what training will hold besides (gradients
    that accumulate and two moments of the optimizer). A tenth stays free."""
    each = max(1, two - one)
    return max(1, min(rows, 1 + int((0.9 * room - to_come - one) // each)))


def _guess(root: nn.Module, batch: Batch, world: World) -> int:
    """Rows whose activations should fit into 40 % of a CPU machine's free memory."""
    import psutil

    config = root.student.config
    floats = config.num_hidden_layers * (22 * config.hidden_size + 5 * config.intermediate_size)
    per_row = 2 * batch.input_ids.shape[1] * floats * 4  # two streams, fp32
    return max(1, int(0.4 * psutil.virtual_memory().available / world.local_size / per_row))
