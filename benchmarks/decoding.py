"""Decoding side by side: block diffusion against our own AR decoding, both cached, and against re-encoding the prefix.

    python benchmarks/decoding.py MODEL            # MODEL: a run or an exported folder (any block-diffusion model)

Arms take turns in one process with one thread; the table gives medians of CPU seconds. "re-encoded" is the same decoding
with the prefix encoded anew for every block, which is what dLLM does. The prompt is a held-out text of the model's run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.9, 0.7])
    args = parser.parse_args()
    import torch

    from adapt.generation.load import open_model

    torch.set_num_threads(1)
    opened = open_model(args.model)
    prompts = held_out(opened, args.prompt_tokens, 8)
    arms = {"ar": sampler("ar")}
    for b in args.blocks:
        for tau in args.thresholds:
            arms[f"b={b} tau={tau}"] = sampler("block_diffusion", block_size=b, threshold=tau)
        arms[f"b={b} tau={args.thresholds[0]} re-encoded"] = Reencoded(b, args.thresholds[0])
        arms[f"b={b} self-speculation"] = sampler("self_speculation", block_size=b)
    table = measure(arms, opened.model, prompts[:1], args)
    base = table["ar"]
    same = {n: r["tokens"] == base["tokens"] for n, r in table.items() if "speculation" in n}
    print("| decoding | tokens per forward | tokens per CPU s | x AR |\n|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['per_forward']:.2f} | {row['rate']:.1f} | {row['rate'] / base['rate']:.2f} |")
    print(f"\nself-speculation writes what greedy AR writes: {same}")
    b = args.blocks[0]
    one = sampler("block_diffusion", block_size=b, threshold=args.thresholds[0])
    rows = measure({"batch of 8": one}, opened.model, prompts, args)["batch of 8"]["rate"]
    alone = measure({"8 single rows": OneByOne(one)}, opened.model, prompts, args)["8 single rows"]["rate"]
    print(f"batch of 8 against 8 single rows, b={b}: {rows:.1f} / {alone:.1f} tokens per CPU s = {rows / alone:.2f}")


def sampler(name: str, **fields):
    from adapt.components import SamplerChoice
    from adapt.config import decode

    return decode({"name": name, **fields}, SamplerChoice).build()


def held_out(opened, length: int, count: int) -> list[list[int]]:
    """The first rows of documentation text, each `length` tokens."""
    from adapt.data.sources.docstrings import DocstringsConfig, DocstringsSource

    ids: list[int] = []
    for document in DocstringsSource(DocstringsConfig(split="held-out")).documents():
        ids += opened.tokenizer(document.text)["input_ids"]
        if len(ids) >= length * count:
            break
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def measure(arms, model, prompts, args) -> dict[str, dict]:
    found: dict[str, list[tuple[float, list]]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            started = time.process_time()
            results = arm.generate_batch(model, prompts, max_new_tokens=args.new_tokens)
            found[name].append((time.process_time() - started, results))
            print(name, f"{found[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
    table = {}
    for name, runs in found.items():
        results = runs[-1][1]
        tokens = sum(len(r.tokens) for r in results)
        table[name] = {
            "tokens": [r.tokens for r in results],
            "per_forward": tokens / sum(r.forwards for r in results),
            "rate": tokens / statistics.median(seconds for seconds, _ in runs),
        }
    return table


class OneByOne:
    def __init__(self, inner):
        self.inner = inner

    def generate_batch(self, model, prompts, **options):
        return [self.inner.generate(model, prompt, **options) for prompt in prompts]


class Reencoded:
    """Block by block, each with the text so far as a fresh prompt: nothing is kept between blocks."""

    def __init__(self, block_size: int, threshold: float):
        self.size = block_size
        self.inner = sampler("block_diffusion", block_size=block_size, threshold=threshold)

    def generate_batch(self, model, prompts, *, max_new_tokens):
        from dataclasses import replace

        (prompt,) = prompts
        tokens, forwards, result = [], 0, None
        while len(tokens) < max_new_tokens:
            width = min(self.size, max_new_tokens - len(tokens))
            result = self.inner.generate(model, [*prompt, *tokens], max_new_tokens=width)
            tokens, forwards = tokens + result.tokens, forwards + result.forwards
        return [replace(result, tokens=tokens, forwards=forwards)]


if __name__ == "__main__":
    main()
