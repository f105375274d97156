"""What a checkpoint costs a run: how long training waits for a save, and how long a run takes to go on.

    python benchmarks/checkpoints.py stall     # written while training goes on, against a save that it waits for
    python benchmarks/checkpoints.py resume    # from launch to the first step: at sample 1,000,000 against sample 0

`stall`: weights and AdamW moments of SmolLM2-135M's shapes (fp32), the two kinds of save in turn, one thread. Training
waits for the copy alone; the first copy also has the memory brought in, so it has a column of its own. `resume`: processes
of `adapt fit --resume` on a tiny model, in turn; both checkpoints are of the same run, the later one with its counters set
on (the data are read by position, whatever was trained between). CPU seconds are shown as well: other processes on the
machine disturb them little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SAMPLES = 1_000_000
ROWS = 4
"""A step, of 64 tokens each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["stall", "resume"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30, help="of the model of `stall`")
    parser.add_argument("--dir", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        if args.case == "stall":
            stall(Path(folder), args.layers, args.rounds)
        else:
            resume(Path(folder), args.rounds)


def shown(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"


def stall(folder: Path, layers: int, rounds: int) -> None:
    import torch

    from adapt.distributed.saver import Saver
    from adapt.distributed.world import World
    from adapt.train.root import Root
    from benchmarks.steps import smollm2

    torch.set_num_threads(1)
    root = Root(smollm2(layers))
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-5)
    for parameter in root.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    waited: dict[bool, list[float]] = {True: [], False: []}
    written, step = [], 0
    alone = World(0, 0, 1, 1, torch.device("cpu"))
    with Saver(alone) as waiting, Saver(alone) as going_on:  # the first lets go of the copy's memory
        for _ in range(rounds + 1):
            for wait, saver in ((True, waiting), (False, going_on)):
                started, step = time.perf_counter(), step + 1
                saver.save(folder, step, root, optimizer, {}, wait=wait)
                waited[wait].append(time.perf_counter() - started)
                saver.finish()
                written.append(time.perf_counter() - started)
                size = sum(file.stat().st_size for file in (folder / f"step-{step}").iterdir())
                shutil.rmtree(folder / f"step-{step}")
    both, meanwhile = waited[True][1:], waited[False][1:]
    ratios = [b / a for a, b in zip(both, meanwhile, strict=True)]
    print("| checkpoint | training waits, save it waits for, s | written meanwhile, s | ratio | first copy, s |")
    print("|---|---|---|---|---|")
    print(f"| {size / 1e9:.2f} GB | {shown(both)} | {shown(meanwhile)} | {shown(ratios)} | {waited[False][0]:.2f} |")


def resume(folder: Path, rounds: int) -> None:
    import yaml

    from tests import tiny
    from tests.recipes import tiny_recipe

    steps = SAMPLES // ROWS
    base = tiny.save_tiny(folder / "base")
    recipe = tiny_recipe(base, folder, trainer={"steps": 2 * steps, "batch_tokens": 64 * ROWS, "max_time": "00:00:00"})
    recipe["evaluation"] = {}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    first_step(file, folder)
    run = folder / "runs" / "tiny"
    start = shutil.copytree(run, folder / "start")
    later = shutil.copytree(run, folder / "later")
    set_on(later / "checkpoints", steps)
    times: dict[str, list[tuple[float, float]]] = {"0": [], f"{SAMPLES:,}": []}
    for _ in range(rounds):
        for name, kept in zip(times, (start, later), strict=True):
            shutil.rmtree(run)
            shutil.copytree(kept, run)
            times[name].append(first_step(file, folder, "--resume"))
    print("| goes on at sample | from launch to the end of the first step, s | CPU s |")
    print("|---|---|---|")
    for name, found in times.items():
        print(f"| {name} | {' | '.join(shown(list(column)) for column in zip(*found, strict=True))} |")
    low, high = (list(zip(*found, strict=True)) for found in times.values())
    ratios = [[b / a for a, b in zip(*pair, strict=True)] for pair in zip(low, high, strict=True)]
    print(f"| ratio | {' | '.join(map(shown, ratios))} |")


def set_on(checkpoints: Path, steps: int) -> None:
    """Make the one checkpoint that of a run `steps` further on."""
    from adapt.distributed.checkpoint import STATE
    from adapt.distributed.checksums import SUMS, put, put_sums

    (path,) = checkpoints.glob("step-*")
    state = json.loads((path / STATE).read_text())
    state |= {"step": steps, "stage_step": steps, "tokens": steps * ROWS * 64}
    sums = dict(reversed(line.split("  ")) for line in (path / SUMS).read_text().splitlines())
    put_sums(path, sums | {STATE: put(path / STATE, json.dumps(state))})
    path.rename(checkpoints / f"step-{steps}")


def first_step(file: Path, folder: Path, *args: str) -> tuple[float, float]:
    """Seconds, and CPU seconds, until the run has told of a step. It stops by itself behind that."""
    import psutil

    command = [sys.executable, "-m", "adapt", "fit", "-c", str(file), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ADAPT_CACHE": str(folder / "cache")}
    started, took = time.perf_counter(), None
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step ") and took is None:
                used = psutil.Process(process.pid).cpu_times()
                took = time.perf_counter() - started, used.user + used.system
    if process.returncode != 75 or took is None:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return took


if __name__ == "__main__":
    main()
