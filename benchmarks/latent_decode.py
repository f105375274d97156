"""One token after a long context: latent attention absorbed, as transformers decodes it, and the grouped attention it replaces.

    python benchmarks/latent_decode.py layer           # one attention layer of SmolLM2-135M's shapes
    python benchmarks/latent_decode.py model           # all 30 layers, embedding to logits

`grouped` is transformers' Llama with SDPA; `expanded` its DeepseekV3, which maps the latents of all tokens to keys and
values at every step; `absorbed` the same parameters as `adapt generate` opens them. Weights are random, and so is what
the caches hold: no time depends on them. One thread, float32, one row. Process CPU time: variants take turns, medians
count.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from statistics import median

import torch

from adapt.conversion.latent_config import stock_config
from adapt.generation.absorb import absorb
from benchmarks.latent import timed
from benchmarks.steps import smollm2

RANKS = {"12.5 %": 16, "50 %": 160}
"""Of the latent, beside a RoPE key of 32: shares of the cache of grouped attention, 384 numbers per token and layer."""


def models(layers: int) -> dict[str, torch.nn.Module]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = smollm2(layers).eval()
    made = {"grouped": base}
    for share, rank in RANKS.items():
        rope = dict(base.config.rope_parameters)
        config = stock_config(base.config, rank, 32, 32, rope, biases=False)
        stock = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        made[f"{share} expanded"] = stock
        made[f"{share} absorbed"] = absorb(copy.deepcopy(stock))
    return made


@torch.inference_mode()
def decode(what: str, lengths: list[int], repeat: int, layers: int) -> None:
    """A step appends to the cache, which copies it, as in transformers, and is taken back."""
    every = models(layers if what == "model" else 1)
    print(f"\nOne token, {what}, CPU ms (times the speed of grouped attention)\n")
    print(f"| tokens | {' | '.join(every)} |\n|---|{'---|' * len(every)}")
    for length in lengths:
        steps = {name: step(model, what, length) for name, model in every.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(repeat + 1):
            for name, call in steps.items():
                took = timed(call)
                if turn:  # the first is a warm-up
                    seconds[name].append(took)
        found = {name: median(times) for name, times in seconds.items()}
        cells = [f"{1000 * t:.2f} ({found['grouped'] / t:.2f}x)" for t in found.values()]
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)


def step(model, what: str, length: int):
    cache = filled(model, length)
    place = torch.tensor([[length]])
    token, x = torch.randint(0, 49152, (1, 1)), torch.randn(1, 1, model.config.hidden_size)
    turn = model.model.rotary_emb(x, place)
    layer = model.model.layers[0].self_attn

    def call():
        before = [(held, held.keys, held.values) for held in cache.layers]
        if what == "model":
            model(token, past_key_values=cache, position_ids=place)
        else:
            layer(
                hidden_states=x,
                position_embeddings=turn,
                position_ids=place,
                attention_mask=None,
                past_key_values=cache,
            )
        for held, keys, values in before:
            held.keys, held.values = keys, values

    return call


def filled(model, length: int):
    """A cache of `length` drawn tokens, in the shapes of what a first few have left there."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(torch.randint(0, 49152, (1, 4)), past_key_values=cache)
    for held in cache.layers:
        for name in ("keys", "values"):
            rows, heads, _, size = getattr(held, name).shape
            setattr(held, name, torch.randn(rows, heads, length, size))
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layer", "model"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    decode(args.what, args.lengths, args.repeat, args.layers)


if __name__ == "__main__":
    main()
