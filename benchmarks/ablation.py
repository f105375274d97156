"""What each switch of block diffusion is worth: one small AR model, eight ways to adapt it, equal clean tokens.

    python benchmarks/ablation.py --runs runs/ablation              # base, then arms x seeds; finished rows are skipped
    python benchmarks/ablation.py --runs runs/ablation --fill       # decode finished runs that were not
    python benchmarks/ablation.py --report                          # ablation.csv -> ablation.md, ablation.png

The base is a Llama of 2.2M parameters, trained from scratch by `adapt fit` (next_token) on the documentation of
installed packages, with a BPE tokenizer made from the training split. Every arm goes on from that one checkpoint. A
run is a process of its own with one thread: `adapt fit`, then the same held-out questions for every arm.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
CSV = HERE / "ablation.csv"

B, SEQ_LEN, BATCH_TOKENS = 16, 256, 1024
BASE_STEPS, STEPS, BASE_LR, LR = 1200, 64, 3e-3, 1e-3
SHAPE = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 5, "num_attention_heads": 5}
SHAPE |= {"num_key_value_heads": 5, "max_position_embeddings": 512, "tie_word_embeddings": True}
VOCABULARY = 4096


def objectives(steps: int) -> dict[str, dict]:
    plain = {"name": "block_diffusion", "block_size": B, "growth": None, "ar_weight": 0.0}
    grown = steps * 5 // 8  # as in NBDiff's 2500 of 4000
    growth = {"name": "plateaus", "sizes": [2, 4, 8, 16], "steps": [0, grown // 3, 2 * grown // 3, grown]}
    return {
        "plain": plain,
        "ar": plain | {"ar_weight": 0.5},
        "growth": plain | {"growth": growth},
        "ar+growth": plain | {"ar_weight": 0.5, "growth": growth},
        "block-causal": plain | {"context": "block"},
        "in-place": plain | {"prediction": "inplace"},
        "noisy-first": plain | {"block_first": "noisy"},
        "annealed": plain | {"annealed": grown},
        "next-token": {"name": "next_token"},  # for reference: the same clean tokens, no diffusion
        "start": plain,  # for reference, at 0 steps: the checkpoint all arms go on from
    }


ARMS = list(objectives(STEPS))
STUDIED = ARMS[:8]
UNDECODED = {"next-token"}

# prompts end where a block does, so no arm meets a phase it was not trained at
ROWS, PROMPTS, PROMPT_TOKENS = 32, 48, 64
MEASURES = {
    "masked_ce": f"masked CE, b={B}",
    "elbo": "ELBO, nats/token",
    "ar_ce": "AR CE, nats/token",
    "match_start": "equals start's AR",
    "match_own": "equals own AR",
    "match_text": "equals text",
    "tokens_per_forward": "tokens/forward",
}
BY_T = {f"masked_ce_t{t}": f"masked_ce/held-out/b{B}/t{t}" for t in ("0.25", "0.5", "0.75", "1")}
COST = {"cpu_s_per_step": "CPU s/step", "peak_mib": "peak, MiB", "beyond_mib": "beyond start, MiB"}
COLUMNS = ["arm", "seed", "steps", "clean_tokens", *MEASURES, *BY_T, *COST, "torch", "date"]


def recipe(name: str, runs: Path, *, base: Path, objective: dict, steps: int, lr: float, seed: int) -> Path:
    """Written as YAML (JSON is YAML): what `adapt fit -c` gets."""
    plan = {
        "run": {"name": name, "dir": str(runs), "seed": seed},
        "model": {"base": str(base), "conversions": [] if objective["name"] == "next_token" else ["mask_token"]},
        "data": {
            "seq_len": SEQ_LEN,
            "train": [{"name": "docstrings", "source": {"name": "docstrings", "split": "train"}}],
            "eval": [{"name": "held-out", "source": {"name": "docstrings", "split": "held-out"}}],
        },
        "objective": objective,
        "optimizer": {"name": "adamw", "lr": lr},
        "schedule": {"name": "cosine", "warmup": 0.05, "final": 0.1},
        "trainer": {"steps": steps, "batch_tokens": BATCH_TOKENS, "microbatch": 4},
        "logging": {"tensorboard": False},
        "export": {"dtype": "float32"},
    }
    (file := runs / f"{name}.yaml").write_text(json.dumps(plan, indent=1))
    return file


def make_blank(runs: Path) -> Path:
    """Folder of a tokenizer and random weights."""
    blank = runs / "blank"
    if not (blank / "config.json").is_file():
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        from adapt.data.sources.docstrings import DocstringsConfig, DocstringsSource

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|end|>", "<|mask|>"]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
        documents = DocstringsSource(DocstringsConfig(split="train")).documents()
        bpe.train_from_iterator((d.text for d in documents), trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", mask_token="<|mask|>")
        torch.manual_seed(0)
        shape = SHAPE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(blank)
        tokenizer.save_pretrained(blank)
    return blank


def make_base(runs: Path) -> None:
    """AR training from scratch."""
    blank = make_blank(runs)
    if not (runs / "base" / "export" / "config.json").is_file():
        objective = {"name": "next_token"}
        file = recipe("base", runs, base=blank, objective=objective, steps=BASE_STEPS, lr=BASE_LR, seed=1000)
        subprocess.run([sys.executable, "-m", "adapt", "fit", "-c", str(file), "--resume=auto"], check=True)


def one(arm: str, seed: int, steps: int, runs: Path) -> dict[str, object]:
    """In a process of its own: train where there is no export yet, then measure."""
    import torch

    from adapt.cli import main
    from adapt.train.module import Stage

    name = f"{arm}-{seed}" + (f"-{steps}" if steps not in (0, STEPS) else "")
    folder, cost = runs / name, runs / name / "cost.json"
    if not cost.is_file():
        seconds, step, before, peak = [], Stage.training_step, [], []

        def timed(self, *args):
            before.append(resident())
            started = time.process_time()
            step(self, *args)
            seconds.append(time.process_time() - started)
            peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

        Stage.training_step = timed
        objective = objectives(steps)[arm]
        file = recipe(name, runs, base=runs / "base/export", objective=objective, steps=steps, lr=LR, seed=seed)
        if code := main(["fit", "-c", str(file), "--resume=auto"]):
            sys.exit(code)
        found = [statistics.median(seconds), peak[-1], peak[-1] - before[0]] if seconds else [""] * 3
        cost.write_text(json.dumps(dict(zip(COST, found, strict=True))))
    row = {"arm": arm, "seed": seed, "steps": steps, "clean_tokens": steps * BATCH_TOKENS}
    row |= measure(arm, folder, runs) | json.loads(cost.read_text())
    return row | {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def resident() -> float:
    """MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def measure(arm: str, folder: Path, runs: Path) -> dict[str, float]:
    """Held-out rows, masks and prompts are the same for every arm and seed."""
    from types import SimpleNamespace

    from adapt.evaluate import runner, verb
    from adapt.generation.load import open_model

    own = verb.recipe_of(SimpleNamespace(model=str(folder), config=None))
    opened = open_model(str(folder))
    context = verb.context_of(opened, own, limit=ROWS, seed=0)
    suites = "bpb" if arm == "next-token" else "bpb,masked_ce,elbo"
    found = runner.evaluate(verb.choices(suites, own), context)
    keys = {"ar_ce": "ar_loss/held-out", "masked_ce": f"masked_ce/held-out/b{B}", "elbo": f"elbo/held-out/b{B}"} | BY_T
    row = {column: found[key] for column, key in keys.items() if key in found}
    if arm not in UNDECODED:
        start = opened if arm == "start" else open_model(str(runs / "start-0"))
        row |= decode(opened.model, start.model, context)
    return row


def decode(model, start, context) -> dict[str, float]:
    """Greedy decoding of one block behind each prompt, against text and AR decoding; two blocks for the speed."""
    from adapt.evaluate.suites.tokens_per_forward import TokensPerForwardConfig, prompts
    from adapt.generation.ar import ArConfig, ArSampler
    from adapt.generation.block_diffusion import BlockDiffusionConfig, BlockDiffusionSampler

    wanted = TokensPerForwardConfig(num_prompts=PROMPTS, prompt_tokens=PROMPT_TOKENS + B)
    found = [ids for ids in prompts(wanted, context) if len(ids) == PROMPT_TOKENS + B]
    beginnings, text = [ids[:PROMPT_TOKENS] for ids in found], [ids[PROMPT_TOKENS:] for ids in found]

    def tokens(sampler, of):
        return [row.tokens for row in sampler.generate_batch(of, beginnings, max_new_tokens=B)]

    def same(left, right) -> float:
        pairs = [a == b for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]
        return sum(pairs) / len(pairs)

    blocks = tokens(BlockDiffusionSampler(BlockDiffusionConfig(threshold=1.0)), model)  # one token per forward
    fast = BlockDiffusionSampler(BlockDiffusionConfig(threshold=0.9))
    rows = fast.generate_batch(model, beginnings, max_new_tokens=2 * B)
    return {
        "match_start": same(blocks, tokens(ArSampler(ArConfig()), start)),
        "match_own": same(blocks, tokens(ArSampler(ArConfig()), model)),
        "match_text": same(blocks, text),
        "tokens_per_forward": sum(len(r.tokens) for r in rows) / sum(r.forwards for r in rows),
    }


def finished() -> list[dict[str, str]]:
    return list(csv.DictReader(CSV.read_text().splitlines())) if CSV.is_file() else []


def write(rows: list[dict]) -> None:
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def report(rows: list[dict[str, str]]) -> None:
    """Tables into ablation.md (between its two marks; the text around is written by hand), dots into ablation.png."""
    import matplotlib.pyplot as plt

    columns, budgets = MEASURES | COST, sorted({int(r["steps"]) for r in rows} - {0})

    def found(steps: int, arm: str, key: str) -> list[float]:
        return [float(r[key]) for r in rows if r["arm"] == arm and r["steps"] in (str(steps), "0") and r[key]]

    lines = []
    for steps in budgets:
        lines += ["", f"{steps} steps, {steps * BATCH_TOKENS:,} clean tokens:", ""]
        lines += [f"| arm | seeds | {' | '.join(columns.values())} |", "|---|---|" + "---|" * len(columns)]
        for arm in (a for a in ARMS if found(steps, a, "ar_ce")):
            cells = [summary(found(steps, arm, k), 3 if k in MEASURES else 0 if "mib" in k else 2) for k in columns]
            lines.append(f"| {arm} | {len(found(steps, arm, 'ar_ce'))} | {' | '.join(cells)} |")
    page = HERE / "ablation.md"
    before, mark, rest = page.read_text().partition("<!-- tables -->\n")
    page.write_text(before + mark + "\n".join(lines) + "\n\n" + rest[rest.index("<!-- /tables -->") :])

    shown = ["masked_ce", "elbo", "ar_ce", "match_start"]
    figure, axes = plt.subplots(1, len(shown), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, key in zip(axes, shown, strict=True):
        for y, arm in enumerate(STUDIED):
            for color, steps in zip(("tab:blue", "tab:orange", "tab:green"), budgets, strict=False):
                dots = found(steps, arm, key)
                axis.plot(dots, [y] * len(dots), "o", color=color, alpha=0.6, label="" if y else f"{steps} steps")
            if not found(budgets[0], arm, key):
                where = axis.get_yaxis_transform()
                axis.text(0.5, y, "not measured", transform=where, ha="center", va="center", color="gray")
        axis.axvline(found(0, "start", key)[0], color="gray", linestyle="--", linewidth=1, label="start")
        axis.set_title(MEASURES[key] + (" (more is better)" if key == "match_start" else ""), fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set(yticks=range(len(STUDIED)), yticklabels=STUDIED, ylim=(len(STUDIED) - 0.5, -0.5))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(HERE / "ablation.png", dpi=90)


def summary(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="where run folders go")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH_TOKENS} clean tokens, for every arm")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--fill", action="store_true", help="measure finished runs again that were not decoded")
    parser.add_argument("--report", action="store_true", help="write the table and the plot; run nothing")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    if args.child:
        print("RESULT " + json.dumps(one(args.child[0], *map(int, args.child[1:]), args.runs)))
        return
    if args.report:
        return report(finished())
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    make_base(args.runs)
    wanted = [("start", "0", "0")] if "start" in args.arms else []
    studied = [arm for arm in args.arms if arm != "start"]
    wanted += [(arm, str(seed), str(args.steps)) for seed in args.seeds for arm in studied]  # a whole round per seed
    for run in wanted:
        rows = finished()
        place = next((i for i, r in enumerate(rows) if (r["arm"], r["seed"], r["steps"]) == run), len(rows))
        if place < len(rows) and not (args.fill and rows[place]["match_own"] == "" and run[0] not in UNDECODED):
            continue
        command = [sys.executable, __file__, "--runs", str(args.runs), "--child", *run]
        out = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(f"{' '.join(run)} failed:\n{out.stdout[-1500:]}\n{out.stderr[-3000:]}")
        rows[place : place + 1] = [json.loads(lines[-1][7:])]
        write(rows)
        print(*(f"{k}={v:.4g}" if isinstance(v, float) else v for k, v in rows[place].items()), flush=True)


if __name__ == "__main__":
    main()
