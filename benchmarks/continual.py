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


ONE_STAGE = "stages=[{name: everything, trainer: {steps: 24}}]"


def new_rows(init: str, *more: str) -> list[str]:
    return [
        f"model.conversions=[{{name: vocabulary, init: {init}, pad_to_multiple: 64}}]",
        "evaluation.limit=16",
        *more,
    ]


EXPERIMENTS = {
    "dap": {
        "no replay": replay(0.0),
        "5 % replay": replay(0.05),
        "25 % replay": replay(0.25),
        "25 % replay, KL 0.1": ["export.interpolation=null"],
    },
    "meap": {"next_token": ["objective={name: next_token}"], "meap": []},
    "masked_thought": {"fine-tuning": ["objective={name: next_token}"], "masked_thought": []},
    "cabrita": {  # 24 steps of 1,024 tokens each; the base's own tokenizer needs half as many tokens again for the same text
        "base tokenizer": ["tokenizer.recipe=null", "model.conversions=[]", "evaluation.limit=16", ONE_STAGE],
        "subword_mean": new_rows("subword_mean"),
        "subword_mean, one stage": new_rows("subword_mean", ONE_STAGE),
        "blend 0.5": new_rows("blend"),
        "mean": new_rows("mean"),
        "normal_cov 1": new_rows("{name: normal_cov, alpha: 1.0}"),
        "focus": new_rows("focus"),
    },
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
    "cabrita": ["bpb_by_bytes/pt", "bpb_by_bytes/en", "tokens_per_byte/pt", "bpb/pt", "bpb/en"],
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
        for arm in arms:
            of_arm = [r for r in own if r["arm"] == arm]
            steps = sorted({int(r["step"]) for r in of_arm})
            for what, step in (("before", steps[0]), ("after", steps[-1])) if steps else ():
                found = {r["metric"]: r["value"] for r in of_arm if int(r["step"]) == step}
                out.append(f"| {arm}, {what} | {' | '.join(found.get(m, '') for m in metrics)} |")
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
