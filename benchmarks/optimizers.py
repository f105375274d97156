"""Optimizers at equal tokens, each over a small grid of learning rates, all rates reported.

    python benchmarks/optimizers.py scratch --runs runs/optimizers      # 2.2M parameters from random weights
    python benchmarks/optimizers.py continued --runs runs/optimizers    # the upper six layers of SmolLM2-135M
    python benchmarks/optimizers.py scratch continued --report          # the tables of README.md from finished runs

Either is one recipe with an arm for every optimizer and rate, trained by `adapt fit`; finished arms are kept. Updates of
Muon and COSMOS are scaled to AdamW's size, so all have the same grid.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from adapt.config import load  # noqa: E402

OPTIMIZERS = {
    "adamw": {"weight_decay": 0.1},
    "muon": {"weight_decay": 0.1},
    "soap": {"weight_decay": 0.1},
    "cosmos": {"weight_decay": 0.1},
}
RATES = {"scratch": (2e-3, 6e-3, 2e-2), "continued": (2e-4, 6e-4)}
METRIC = {"scratch": "bpb/held-out", "continued": "bpb/security-val"}


def arm(name: str, rate: float) -> str:
    return f"{name}-{rate:.0e}"


def arms(rates: tuple[float, ...], shipped: dict[str, dict]) -> dict[str, dict]:
    """Each optimizer at each rate, with what the shipped arm says besides."""
    return {
        arm(name, rate): shipped.get(name, {}) | {"optimizer": {"name": name, "lr": rate} | keys}
        for name, keys in OPTIMIZERS.items()
        for rate in rates
    }


def scratch(runs: Path) -> dict:
    import ablation

    blank = ablation.make_blank(runs)
    docstrings = {"name": "docstrings", "split": "train"}
    return {
        "model": {"base": str(blank)},
        "data": {
            "seq_len": 256,
            "train": [{"name": "docstrings", "source": docstrings}],
            "eval": [{"name": "held-out", "source": docstrings | {"split": "held-out"}}],
        },
        "objective": {"name": "next_token"},
        "schedule": {"name": "linear", "warmup": 0.1, "final": 0.1},
        "trainer": {"steps": 200, "batch_tokens": 2048, "microbatch": 8},
        "evaluation": {"suites": ["bpb"], "every": 50, "limit": 64},
    }


def continued(runs: Path) -> dict:
    """The shipped recipe; at 2e-4 its arms are the shipped ones."""
    return {"extends": "cosmos"}


RECIPES = {"scratch": scratch, "continued": continued}


def train(which: str, runs: Path) -> None:
    runs.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[which](runs) | {"run": {"name": which, "dir": str(runs)}, "logging": {"tensorboard": False}}
    shipped = load("cosmos").plain["arms"] if which == "continued" else {}
    recipe["arms"] = dict.fromkeys(shipped) | arms(RATES[which], shipped)  # null: not by their own names
    file = runs / f"{which}.yaml"
    file.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    subprocess.run([sys.executable, "-m", "adapt", "fit", "-c", str(file), "--resume=auto"], check=True)


def table(which: str, runs: Path) -> str:
    metric = METRIC[which]
    out = [f"| {metric} | " + " | ".join(f"lr {rate:g}" for rate in RATES[which]) + " |"]
    out.append("|---" * (len(RATES[which]) + 1) + "|")
    for name in OPTIMIZERS:
        cells = [_last(runs / which / arm(name, rate) / "metrics.jsonl", metric) for rate in RATES[which]]
        out.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(out)


def _last(file: Path, metric: str) -> str:
    lines = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
    found = [line[f"eval/{metric}"] for line in lines if line.get(f"eval/{metric}") is not None]
    return f"{found[-1]:.4f}" if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="+", choices=list(RECIPES))
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--report", action="store_true", help="print the tables; train nothing")
    args = parser.parse_args()
    runs = args.runs.absolute()
    for which in args.which:
        if not args.report:
            train(which, runs)
        print(table(which, runs), "\n")


if __name__ == "__main__":
    main()
