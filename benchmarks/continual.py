"""What continual pretraining and masked objectives are worth: shipped recipes against their plain twins, equal tokens.

    python benchmarks/continual.py --runs runs/continual                 # every arm; finished ones are skipped
    python benchmarks/continual.py --runs runs/continual --only dap      # one experiment
    python benchmarks/continual.py --report                              # continual.csv -> the tables of README.md

An arm is a shipped recipe with overrides, run by `adapt fit` in a process of its own. What its evaluations measured goes
into continual.csv, one line a metric and step.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
CSV = HERE / "continual.csv"
COLUMNS = ["experiment", "arm", "seed", "step", "metric", "value", "date"]


def replay(share: float) -> list[str]:
    plain = ["objective.kl_to_base=0", "export.interpolation=null", "evaluation.every=16"]
    return [f"data.train.0.weight={1 - share}", f"data.train.1.weight={share}", *plain]


EXPERIMENTS = {
    "dap": {
        "no replay": replay(0.0),
        "5 % replay": replay(0.05),
        "25 % replay": replay(0.25),
        "25 % replay, KL 0.1": ["export.interpolation=null"],
    },
    "meap": {"next_token": ["objective={name: next_token}"], "meap": []},
    "masked_thought": {"fine-tuning": ["objective={name: next_token}"], "masked_thought": []},
}
SHOWN = {
    "dap": [
        "bpb/security-val",
        "bpb/english-val",
        "forgetting/worst",
        "accuracy/security-val",
        "multiple_choice/attack",
    ],
    "meap": ["bpb/held-out", "passkey", "passkey_nll", "multi_needle_one", "multi_needle_nll"],
    "masked_thought": ["exact_match/arithmetic", "answer_loss/arithmetic"],
}


def run(experiment: str, arm: str, seed: int, runs: Path) -> list[dict[str, object]]:
    name = "-".join([experiment, *"".join(c if c.isalnum() else " " for c in arm).split(), str(seed)])
    command = [sys.executable, "-m", "adapt", "fit", "-c", experiment, *EXPERIMENTS[experiment][arm]]
    command += [f"run.dir={runs}", f"run.name={name}", f"run.seed={seed}", "--resume=auto"]
    subprocess.run(command, check=True)
    lines = map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
    measured = {(line["step"], key): value for line in lines for key, value in line.items() if key.startswith("eval/")}
    facts = {"experiment": experiment, "arm": arm, "seed": seed, "date": time.strftime("%Y-%m-%d")}
    return [
        facts | {"step": step, "metric": key.removeprefix("eval/"), "value": f"{value:.5g}"}
        for (step, key), value in measured.items()
        if value is not None
    ]


def finished() -> list[dict[str, str]]:
    return list(csv.DictReader(CSV.read_text().splitlines())) if CSV.is_file() else []


def add(rows: list[dict[str, object]]) -> None:
    is_new = not CSV.is_file()
    with CSV.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def tables(rows: list[dict[str, str]]) -> str:
    out = []
    for experiment, arms in EXPERIMENTS.items():
        own = [r for r in rows if r["experiment"] == experiment]
        metrics = [m for m in SHOWN[experiment] if any(r["metric"] == m for r in own)]
        out += [f"| {experiment} | {' | '.join(metrics)} |", "|---|" + "---|" * len(metrics)]
        start = {r["metric"]: r["value"] for r in own if r["step"] == "0"}
        if own:
            out.append(f"| before | {' | '.join(start.get(m, '') for m in metrics)} |")
        for arm in arms:
            of_arm = [r for r in own if r["arm"] == arm]
            last = max((int(r["step"]) for r in of_arm), default=0)
            end = {r["metric"]: r["value"] for r in of_arm if int(r["step"]) == last}
            if end:
                out.append(f"| {arm} | {' | '.join(end.get(m, '') for m in metrics)} |")
        out.append("")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/continual"), help="where run folders go")
    parser.add_argument("--only", nargs="*", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--report", action="store_true", help="print the tables; run nothing")
    args = parser.parse_args()
    if args.report:
        return print(tables(finished()))
    for seed in args.seeds:
        for experiment in args.only:
            for arm in EXPERIMENTS[experiment]:
                if not any((r["experiment"], r["arm"], r["seed"]) == (experiment, arm, str(seed)) for r in finished()):
                    add(run(experiment, arm, seed, args.runs.absolute()))
    print(tables(finished()))


if __name__ == "__main__":
    main()
