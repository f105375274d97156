"""`adapt health`: what would end a run hours later, in seconds and before it. Every rank looks, the first one tells.

The ranks must meet (an all-reduce whose sum is known, its speed told); nobody else may be on their GPUs; the runs' folder
must be the same one on all nodes, writable, with room.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

GIB = 2**30
BYTES = {"cpu": 2**22, "cuda": 2**28}
"""Of the all-reduce that is timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", metavar="RECIPE", help="look at the disk that this recipe's runs are on")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUBKEY=VALUE", help="dotted overrides of the recipe")
    parser.add_argument("--dir", type=Path, help="where runs are written (default: the recipe's run.dir, or here)")
    parser.add_argument("--disk", type=float, default=5.0, metavar="GIB", help="room it must have (default: 5)")
    parser.add_argument(
        "--gpu", type=float, default=0.9, metavar="PART", help="part of each GPU that must be free (default: 0.9)"
    )
    parser.add_argument("--timeout", type=int, default=120, metavar="S", help="seconds to wait for all ranks")


def health(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 where something is wrong. Raises RankLost where the ranks do not come together, and UserError for
    a recipe that cannot be read."""
    from adapt.train.signals import StopFlag

    with StopFlag() as flag, flag.at_once("in the health check"):
        folder = _folder(args)
        from adapt.distributed import world as worlds

        world = worlds.start("auto", args.timeout, flag, args.timeout)
        try:
            problems = [*_reduces(world), *_gpu(world, args.gpu), *_disk(world, folder, args.disk)]
            reports = worlds.together(lambda: _report(world) | {"problems": problems})
        finally:
            worlds.stop()
    if world.main:
        _tell(reports)
    return int(any(report["problems"] for report in reports))


def _folder(args: argparse.Namespace) -> Path:
    if args.dir is not None or args.config is None:
        return args.dir or Path()
    from adapt.config import load

    return Path(load(args.config, args.overrides).recipe.run.dir)


def _report(world: Any) -> dict[str, Any]:
    from adapt.runfolder import environment

    about = environment(0)
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "device": str(world.device),
        "versions": about["versions"],
        "git": about["git"],
        "hardware": about["hardware"],
    }


def _reduces(world: Any) -> Iterator[str]:
    """A sum that is known, and the time of a large one."""
    import torch

    kind = world.device.type
    wanted = world.size * (world.size + 1) // 2
    found = int(world.add_up(torch.tensor([world.rank + 1.0], device=world.device)))
    if found != wanted:
        yield f"all-reduce over {world.size} rank(s): the sum of 1 to {world.size} came out as {found}, not {wanted}"
    if world.size > 1:
        data = torch.ones(BYTES[kind] // 4, device=world.device)
        for _ in range(2):  # the first one connects
            world.barrier()
            began = time.perf_counter()
            world.add_up(data)
            if kind == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
        moved = 2 * (world.size - 1) / world.size * BYTES[kind]  # of a ring, each way
        if world.main:
            print(
                f"all-reduce of {BYTES[kind] >> 20} MiB over {world.size} ranks: {moved / took / 1e9:.2f} GB/s a rank"
            )


def _gpu(world: Any, part: float) -> Iterator[str]:
    import torch

    if world.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(world.device)
        free += torch.cuda.memory_reserved(world.device)
        if free < part * whole - GIB:  # a context and the collectives' buffers are ours
            yield (
                f"{world.device} has {free / GIB:.1f} of {whole / GIB:.1f} GiB free: something else is on it "
                "(nvidia-smi names it)"
            )


def _disk(world: Any, folder: Path, room: float) -> Iterator[str]:
    """Collective: rank 0 writes a file, all others must see it."""
    from adapt.distributed import world as worlds

    mark, error = worlds.from_main(folder / f".health-{uuid.uuid4().hex}"), ""
    if world.main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text("of a health check; may be deleted")
        except OSError as raised:
            error = f"{folder.absolute()} cannot be written: {raised.strerror}"
    error = worlds.from_main(error)
    if error:
        if world.main:
            yield error
        return
    with suppress(OSError):
        os.listdir(folder)  # NFS looks again
    seen = mark.is_file()
    world.barrier()
    if world.main:
        mark.unlink()
    if not seen:
        yield f"{folder.absolute()} is not the folder that rank 0 sees: runs need one that all nodes share (--dir)"
        return
    free = shutil.disk_usage(folder).free / GIB
    if free < room:
        yield f"{folder.absolute()} has {free:.1f} GiB of room, and {room:g} were asked for (--disk)"


def _tell(reports: list[dict[str, Any]]) -> None:
    """Who is here; what differs between ranks is a reason to look."""
    for key in ("versions", "git"):
        kinds: dict[str, list[int]] = {}
        for report in reports:
            kinds.setdefault(json.dumps(report[key], sort_keys=True), []).append(report["rank"])
        if len(kinds) > 1:
            reports[0]["problems"].append(f"ranks have different {key}: {kinds}")
    print("versions:", ", ".join(f"{k} {v}" for k, v in reports[0]["versions"].items()))
    for report in reports:
        machine = report["hardware"]
        gpus = f", {len(machine['gpus'])} x {machine['gpus'][0]}" if machine["gpus"] else ""
        print(
            f"rank {report['rank']}: host {report['host']}, {report['device']}, {machine['cores']} cores, "
            f"{machine['memory_gib']} GiB{gpus}"
        )
    for report in reports:
        for problem in report["problems"]:
            print(f"error: rank {report['rank']} (host {report['host']}): {problem}")
    if not any(report["problems"] for report in reports):
        print(f"healthy: {len(reports)} rank(s)")
