"""What a second rank costs: steps of `adapt fit` on one rank and on two, of the same rows each (weak scaling), beside the bare
collectives of the same bytes.

    python benchmarks/scaling.py                 # 4 layers of SmolLM2-135M's shapes, 2 rows of 512 tokens a rank

One thread a rank, gloo, FSDP2 in fp32. The arms take turns. A step gathers every layer twice and the rest (embedding, norm)
once, and reduces every gradient once; `raw` does that and nothing else, in one group of two processes. Efficiency is t1 / t2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2, help="of 512 tokens, per rank and step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process, after one warm-up")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run = raw if args.child == "raw" else fit
        print("RESULT " + json.dumps(run(args)), flush=True)
        return
    found: dict[str, list[float]] = {"1": [], "2": [], "raw": []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.layers)
        for turn, arm in itertools.product(range(args.rounds), found):
            place = Path(folder) / f"{arm}-{turn}"
            place.mkdir()
            command = [sys.executable, __file__, *sys.argv[1:], "--child", arm, "--folder", str(place)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "ADAPT_CACHE": f"{folder}/cache"}
            out = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
            lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines or out.returncode:
                sys.exit(f"{arm} failed:\n{out.stderr[-3000:]}")
            found[arm].append(json.loads(lines[-1][7:]))
            print(arm, f"{found[arm][-1]:.3f}", file=sys.stderr, flush=True)
    one, two, bare = found.values()
    efficiency = [a / b for a, b in zip(one, two, strict=True)]
    more = [b - a for a, b in zip(one, two, strict=True)]
    print("| step of 1 rank, s | of 2 ranks, s | efficiency | 2 ranks - 1 rank, s | bare collectives, s |")
    print("|---|---|---|---|---|")
    print(f"| {' | '.join(map(shown, (one, two, efficiency, more, bare)))} |")


def shown(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def prepare(folder: Path, layers: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.steps import smollm2

    vocabulary = {"<eos>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 49152)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "base")
    smollm2(layers).save_pretrained(folder / "base")
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(2, 49152)}" for _ in range(LENGTH)) for _ in range(200)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


def fit(args: argparse.Namespace) -> float:
    """Seconds of a step, by the clock of rank 0. The other rank runs the same recipe as any user's would."""
    import yaml

    from adapt.config import resolve
    from adapt.train import fit, hooks

    ranks, base = int(args.child), args.folder.parent
    recipe = {
        "run": {"name": "bench", "dir": str(args.folder / "runs")},
        "model": {"base": str(base / "base")},
        "data": {"train": [{"source": f"jsonl:{base / 'corpus.jsonl'}"}], "seq_len": LENGTH},
        "objective": "next_token",
        "optimizer": {"name": "adamw", "lr": 1e-5},
        "schedule": "constant",
        "trainer": {
            "steps": args.steps + 1,
            "batch_tokens": ranks * args.rows * LENGTH,
            "microbatch": args.rows,
            "devices": ranks,
        },
        "generation": {"prompts": []},
        "logging": {"tensorboard": False},
    }
    file = args.folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    sys.argv = ["adapt", "fit", "-c", str(file)]  # what rank 0 starts its other rank with
    times: list[float] = []
    after_step = hooks.Hooks.after_step

    def after(self, stage, **how) -> None:
        times.append(time.perf_counter())
        after_step(self, stage, **how)

    hooks.Hooks.after_step = after
    fit.fit(resolve(recipe))
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def raw(args: argparse.Namespace) -> float:
    from tests.ranks import on_ranks

    on_ranks(2, args.folder, collectives, args.folder / "seconds.json", args.layers, args.steps)
    return json.loads((args.folder / "seconds.json").read_text())


def collectives(file: Path, layers: int, steps: int) -> None:
    import torch
    import torch.distributed as dist

    from benchmarks.steps import smollm2

    with torch.device("meta"):
        model = smollm2(layers)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - layers * layer
    most = torch.zeros(max(layer, rest) // 2 * 2)
    part = torch.zeros(len(most) // 2)
    gathers, reduces = [rest, *[layer] * (2 * layers)], [rest, *[layer] * layers]
    times = []
    for _ in range(steps + 1):
        dist.barrier()
        started = time.perf_counter()
        for size in gathers:
            dist.all_gather_into_tensor(most[: size // 2 * 2], part[: size // 2])
        for size in reduces:
            dist.reduce_scatter_tensor(part[: size // 2], most[: size // 2 * 2])
        times.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(statistics.median(times[1:])))


if __name__ == "__main__":
    main()
