"""`adapt plan` against reality: memory of two real ranks beside plan and tracker, and the seconds of an answer.

    python benchmarks/plan.py memory        # about six minutes
    python benchmarks/plan.py time          # --verify of 70B on 512 ranks takes one of its two minutes

Memory is what a forward and backward adds to the first rank's resident memory, shards included and the optimizer left out:
100M parameters in float32, 2 x 512 tokens, gloo. Objectives and shapes are those of tests/plan/reality.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

ASKED = {
    "8B on 64": ["-c", "paper/nbdiff-qwen3-8b", "--gpus", "64", "--gpu-memory", "80"],
    "70B on 512": ["-c", "paper/dap-llama-3.3-70b-instruct", "--gpus", "512", "--gpu-memory", "80"],
}


def memory() -> None:
    from tests.plan.reality import CASES, foretold, measured

    print("| objective | checkpointing | planned, MiB | tracked | measured | planned / measured | tracked / measured |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        for checkpointing in (False, True):
            with tempfile.TemporaryDirectory() as place:
                real = measured(case, checkpointing, Path(place))
            formula, tracked = foretold(case, checkpointing)
            seen = ("", "") if tracked is None else (f"{tracked / 2**20:,.0f}", f"{tracked / real - 1:+.1%}")
            print(
                f"| {case} | {'full' if checkpointing else 'none'} | {formula / 2**20:,.0f} | {seen[0]} | {real / 2**20:,.0f} "
                f"| {formula / real - 1:+.1%} | {seen[1]} |",
                flush=True,
            )


def seconds(rounds: int) -> None:
    print(f"| plan | wall, s (best of {rounds}) | CPU, s |")
    print("|---|---|---|")
    for name, asked in ASKED.items():
        for more in ([], ["--verify"]):
            took = [_run([*asked, *more]) for _ in range(rounds)]
            wall, cpu = min(took)
            print(f"| {' '.join([name, *more])} | {wall:.1f} | {cpu:.1f} |", flush=True)


def _run(asked: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds of a process of its own."""

    def used() -> float:
        of = resource.getrusage(resource.RUSAGE_CHILDREN)
        return of.ru_utime + of.ru_stime

    start, before = time.perf_counter(), used()
    done = subprocess.run(
        [sys.executable, "-m", "adapt", "plan", *asked],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(f"adapt plan {' '.join(asked)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start, used() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "time"])
    parser.add_argument("--rounds", type=int, default=2, help="of `time`")
    args = parser.parse_args()
    memory() if args.what == "memory" else seconds(args.rounds)


if __name__ == "__main__":
    main()
