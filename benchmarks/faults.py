"""Runs of a tiny model killed at random moments (SIGKILL), and gone on with: what was hit, and what it did.

    python benchmarks/faults.py --runs 9 --kills 12 --seed 1      # of each kind of run

Of `ranks` one of two is killed; the other has to notice. A line per run as it is done, then the table. The loop is that of tests/faults, of other moments for another seed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    from tests import tiny
    from tests.faults.killing import KINDS, Tally, kill
    from tests.faults.warm import NAMES, Warm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--runs", type=int, default=9, help="of each kind")
    parser.add_argument("--kills", type=int, default=12, help="of each run")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    total: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as place, Warm(Path(place)) as warm:
        base = tiny.save_tiny(Path(place) / "base", attention_dropout=0.2)
        for kind in args.kinds:
            total[kind] = Tally()
            rng = random.Random(args.seed)
            for tally in kill(warm, kind, base, Path(place), rng, runs=args.runs, kills=args.kills):
                total[kind] += tally
                print(f"{kind} {total[kind].runs}: {total[kind]}", file=sys.stderr, flush=True)
    print(
        "| run | "
        + " | ".join(NAMES)
        + " | kills | runs | lost | different | left behind | not noticed | noticed after |"
    )
    print("|---|" + "---|" * (len(NAMES) + 7))
    for kind, tally in total.items():
        hits = " | ".join(str(tally.kills[name]) for name in NAMES)
        ends = " | ".join(str(len(found)) for found in (tally.lost, tally.different, tally.left))
        noticed = f"{len(tally.unnoticed)} | {spread(tally.seconds)}" if tally.seconds else "- | -"
        print(f"| {kind} | {hits} | {tally.num_kills} | {tally.runs} | {ends} | {noticed} |")


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s (at most {max(seconds):.1f} s)"


if __name__ == "__main__":
    main()
