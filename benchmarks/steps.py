"""Training steps side by side: ours against the plain implementation, on the model's real shapes.

    python benchmarks/steps.py lce                   # linear + cross-entropy, 2048 x 576 -> 49152
    python benchmarks/steps.py diffusion -L 1024     # block-diffusion step, b = 32
    python benchmarks/steps.py ar                    # AR training, 4 x 512: adapt fit, bare loop, Hugging Face Trainer
    python benchmarks/steps.py transfer              # attention transfer against the teacher's forward and backward
    python benchmarks/steps.py kd                    # distillation from a frozen teacher against full logits of both

Each arm runs in a process of its own with one thread, the arms take turns, and the table gives medians of CPU seconds,
which other processes on the machine disturb little, and of the rounds' ratios. Weights are random
(SmolLM2-135M shapes): a step's cost does not depend on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ARMS = {
    "lce": ["ours", "naive"],
    "diffusion": ["ours", "plain", "ours_ar", "ours_ckpt", "plain_ckpt"],
    "ar": ["bare", "fit", "hf_trainer", "fit_ckpt"],
    "transfer": ["teacher", "ours"],
    "kd": ["naive", "ours"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=ARMS)
    parser.add_argument("-L", type=int, default=1024, help="clean tokens per row (diffusion, transfer, kd)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process, after one warm-up")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--arms", nargs="*", help="only these; the first one is the ratio's base")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(run(args.case, args.child, args)))
        return
    arms = args.arms or ARMS[args.case]
    results: dict[str, list[dict]] = {arm: [] for arm in arms}
    for _ in range(args.rounds):
        for arm in arms:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", arm]
            out = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
            lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{arm} failed:\n{out.stderr[-3000:]}")
            results[arm].append(json.loads(lines[-1][7:]))
            print(arm, results[arm][-1], file=sys.stderr, flush=True)
    print(f"| {args.case} | CPU s per step (median, min-max) | x {arms[0]} | peak, MiB | x | beyond state, MiB | x |")
    print("|---|---|---|---|---|---|---|")
    for arm in arms:
        times, rounds = [r["seconds"] for r in results[arm]], list(zip(results[arm], results[arms[0]], strict=True))
        median = {k: statistics.median(r[k] for r in results[arm]) for k in results[arm][0]}
        ratio = {k: statistics.median(r[k] / base[k] for r, base in rounds) for k in ("seconds", "peak", "beyond")}
        print(
            f"| {arm} | {median['seconds']:.2f} ({min(times):.2f}-{max(times):.2f}) | {ratio['seconds']:.2f} "
            f"| {median['peak'] / 2**20:.0f} | {ratio['peak']:.2f} | {median['beyond'] / 2**20:.0f} "
            f"| {ratio['beyond']:.2f} |"
        )
        if "models" in median:
            print(f"{arm}: building its models took {median['models'] / 2**20:.0f} MiB", file=sys.stderr)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def run(case: str, arm: str, args: argparse.Namespace) -> dict[str, float]:
    if case == "lce":
        return run_lce(arm)
    if case in ("transfer", "kd"):
        from benchmarks import distillation

        return distillation.run(case, arm, args)
    if arm.startswith("fit"):
        return adapt_fit(args.layers, args.steps, checkpointing=arm.endswith("_ckpt"))
    import torch

    torch.manual_seed(0)
    model = smollm2(args.layers)
    if arm.endswith("_ckpt"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    length, rows = (args.L, 1) if case == "diffusion" else (512, 4)
    batch = make_batch(rows, length)
    if arm == "hf_trainer":
        return hf_trainer(model, batch, args.steps)
    step = {
        ("diffusion", "ours"): ours_diffusion,
        ("diffusion", "plain"): plain_diffusion,
        ("diffusion", "ours_ar"): ours_next_token,
        ("ar", "bare"): bare_next_token,
    }[case, arm.removesuffix("_ckpt")](model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for parameter in model.parameters():  # state exists before memory is counted
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = resident()
    times = []
    for _ in range(args.steps + 1):
        started = time.process_time()
        optimizer.zero_grad()
        step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.process_time() - started)
    return {"seconds": statistics.median(times[1:]), "beyond": peak() - state, "peak": peak()}


def run_lce(arm: str) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    from adapt.losses.linear_cross_entropy import linear_cross_entropy

    hidden = torch.randn(2048, 576, requires_grad=True)
    head = (torch.randn(49152, 576) * 0.02).requires_grad_()
    target = torch.randint(0, 49152, (2048,))
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    state, times = resident(), []
    for _ in range(3):
        started = time.process_time()
        if arm == "ours":
            loss = linear_cross_entropy(hidden, head, target)
        else:
            loss = F.cross_entropy(hidden @ head.T, target, reduction="sum")
        loss.backward()
        times.append(time.process_time() - started)
        del loss
    return {"seconds": statistics.median(times[1:]), "beyond": peak() - state, "peak": peak()}


def smollm2(layers: int):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).train()


def make_batch(rows: int, length: int):
    from tests.batches import packed

    batch = packed([[length]] * rows, vocab=49152)
    return batch


def ours_diffusion(model, batch):
    from adapt.objectives.base import Facts
    from adapt.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig

    config = BlockDiffusionConfig(block_size=32, growth=None)
    return ours(model, batch, BlockDiffusion(config, Facts(mask_token_id=5)))


def ours_next_token(model, batch):
    from adapt.objectives.base import Facts
    from adapt.objectives.next_token import NextToken

    return ours(model, batch, NextToken(Facts()))


def ours(model, batch, objective):
    from adapt.models import attention
    from adapt.objectives.base import Models

    attention.use(model)

    def step() -> None:
        item = objective.prepare(batch, seed=0, step=0)
        sums = objective(Models(model), item.inputs)
        sum(t.weight / t.count * sums[n] for n, t in item.terms.items()).backward()

    return step


def plain_diffusion(model, batch):
    """A dense boolean (2L)^2 mask and full logits over both copies, as reference implementations do it."""
    import torch
    import torch.nn.functional as F

    from adapt.models.layout import Layout
    from adapt.objectives.base import Facts
    from adapt.objectives.block_diffusion import BlockDiffusion, BlockDiffusionConfig

    objective = BlockDiffusion(BlockDiffusionConfig(block_size=32, growth=None), Facts(mask_token_id=5))
    length = batch.input_ids.shape[1]
    block = batch.position_ids // 32

    def step() -> None:
        item = objective.prepare(batch, seed=0, step=0)
        mask = Layout.noisy_then_clean(batch.doc_ids, batch.position_ids, block).dense()[:, None]
        ids = item.inputs["input_ids"]
        logits = model(ids, position_ids=item.inputs["position_ids"], attention_mask=mask).logits
        noisy, clean = logits[:, : length - 1].flatten(0, 1), logits[:, length:-1].flatten(0, 1)
        target = batch.labels[:, 1:].flatten()
        masked = torch.where((ids[:, 1:length] == 5).flatten(), target, -100)
        loss = F.cross_entropy(noisy, masked, reduction="sum") + 0.5 * F.cross_entropy(clean, target, reduction="sum")
        (loss / (target != -100).sum()).backward()

    return step


def bare_next_token(model, batch):
    """A plain PyTorch loop with the same fused loss, causal attention over the row and nothing else."""
    from adapt.losses.linear_cross_entropy import linear_cross_entropy

    def step() -> None:
        hidden = model.model(batch.input_ids, position_ids=None).last_hidden_state[:, :-1].flatten(0, 1)
        target = batch.input_ids[:, 1:].flatten()
        (linear_cross_entropy(hidden, model.lm_head.weight, target) / len(target)).backward()

    return step


def adapt_fit(layers: int, steps: int, *, checkpointing: bool) -> dict[str, float]:
    """`adapt fit` itself, from the same weights in a folder, on documents packed into 4 x 512; timed step by step."""
    import contextlib
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from adapt.config import resolve
    from adapt.train import fit, hooks

    folder = Path(tempfile.mkdtemp())
    vocabulary = {"<eos>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 49152)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder / "base"
    )
    smollm2(layers).save_pretrained(folder / "base")
    rng = random.Random(0)
    lengths = [rng.choice((60, 200, 500, 900)) for _ in range(200)]
    documents = [{"text": " ".join(f"w{rng.randrange(2, 49152)}" for _ in range(n))} for n in lengths]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    os.environ["ADAPT_CACHE"] = str(folder / "cache")
    recipe = {
        "run": {"name": "bench", "dir": str(folder / "runs")},
        "model": {"base": str(folder / "base")},
        "data": {"train": [{"source": f"jsonl:{folder / 'corpus.jsonl'}"}], "seq_len": 512},
        "objective": "next_token",
        "optimizer": {"name": "adamw", "lr": 1e-5},
        "schedule": "constant",
        "trainer": {
            "steps": steps + 1,
            "batch_tokens": 2048,
            "microbatch": 4,
            "activation_checkpointing": checkpointing,
        },
    }
    times: list[float] = []
    peaks: list[int] = []
    after_step = hooks.Hooks.after_step

    class Measured(Exception):
        pass

    def after(self, stage, **how) -> None:
        times.append(time.process_time())
        peaks.append(peak())
        if len(times) == steps + 1:
            raise Measured
        after_step(self, stage, **how)

    hooks.Hooks.after_step = after
    before = resident()
    with contextlib.suppress(Measured):
        fit.fit(resolve(recipe))
    taken = [b - a for a, b in itertools.pairwise(times)]
    weights = (folder / "base" / "model.safetensors").stat().st_size  # as many bytes again: gradients, two moments
    return {"seconds": statistics.median(taken), "beyond": peaks[-1] - before - 4 * weights, "peak": peaks[-1]}


def hf_trainer(model, batch, steps: int) -> dict[str, float]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.started = time.process_time()

        def on_step_end(self, *args, **kwargs):
            times.append(time.process_time() - self.started)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4 * (steps + 1)

        def __getitem__(self, i):
            ids = batch.input_ids[i % 4]
            return {"input_ids": ids, "labels": ids}

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        max_steps=steps + 1,
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    state = resident() + 3 * sum(p.numel() * 4 for p in model.parameters())
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Clock()]).train()
    return {"seconds": statistics.median(times[1:]), "beyond": peak() - state, "peak": peak()}


if __name__ == "__main__":
    main()
