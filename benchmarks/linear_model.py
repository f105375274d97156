"""A whole model with recurrent layers against its base on a CPU: prefill, and tokens after it.

    python benchmarks/linear_model.py prefill                     # SmolLM2-135M's shapes, 1K to 8K tokens
    python benchmarks/linear_model.py decode                      # one token after 1K, 4K and 16K

The base is transformers' Llama with SDPA; the others are what `adapt` makes of it: `lawcat` in all layers, or in three of
four. Weights are random, and so is what the caches of `decode` hold: no time depends on them. One thread, float32, one
row, logits of the last token. Process CPU seconds: variants take turns, medians count.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from adapt.conversion.lawcat import Lawcat, LawcatConfig
from benchmarks.linear_attention import medians
from benchmarks.steps import smollm2

STUDENTS = {"all linear": {}, "three of four": {"keep": "every_4"}}


def models(layers: int) -> dict[str, torch.nn.Module]:
    """All share the base's weights."""
    torch.manual_seed(0)
    base = smollm2(layers).eval()
    made = {name: Lawcat(LawcatConfig(**over), seed=0).apply(base, None).eval() for name, over in STUDENTS.items()}
    return {"base": base, **made}


@torch.inference_mode()
def prefill(lengths: list[int], repeat: int, layers: int) -> None:
    print("\nPrefill of a whole model, CPU seconds (times the base's speed), tokens a second\n")
    every = models(layers)
    print(f"| tokens | {' | '.join(every)} |\n|---|{'---|' * len(every)}")
    for length in lengths:
        ids = torch.randint(0, 49152, (1, length))
        variants = {
            name: lambda model=model, ids=ids: model(ids, use_cache=True, logits_to_keep=1)
            for name, model in every.items()
        }
        found = medians(variants, repeat)
        cells = [f"{t:.2f} ({found['base'] / t:.2f}x), {length / t:,.0f}" for t in found.values()]
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)


@torch.inference_mode()
def decode(lengths: list[int], repeat: int, layers: int) -> None:
    """Attention's caches are filled with drawn numbers, and so are states. A step appends to the first, as
    transformers does, and is taken back."""
    print("\nOne token of a whole model, CPU ms, and MB it keeps, after so many tokens\n")
    every, token = models(layers), torch.randint(0, 49152, (1, 1))
    print(f"| tokens | {' | '.join(every)} |\n|---|{'---|' * len(every)}")
    for length in lengths:
        variants, sizes = {}, {}
        for name, model in every.items():
            cache = filled(model, length)
            held = [t for layer in cache.layers for t in kept(layer)]
            sizes[name] = sum(t.numel() * t.element_size() for t in held)

            def step(model=model, cache=cache, place=torch.tensor([[length]])):
                before = [(layer, kept(layer)) for layer in cache.layers if not recurrent(layer)]
                model(token, past_key_values=cache, position_ids=place)
                for layer, tensors in before:
                    layer.keys, layer.values = tensors

            variants[name] = step
        found = medians(variants, repeat)
        cells = [f"{1000 * found[name]:.1f}, {sizes[name] / 1e6:.1f}" for name in every]
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)


def filled(model, length: int):
    """A cache that has seen `length` tokens."""
    from transformers import DynamicCache

    cache = model.model.new_cache() if hasattr(model.model, "new_cache") else DynamicCache(config=model.config)
    model(torch.randint(0, 49152, (1, 16)), past_key_values=cache)
    config = model.config
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    for layer in cache.layers:
        if recurrent(layer):
            layer.states = {name: torch.rand_like(state) for name, state in layer.states.items()}
            layer.seen = length
        else:
            layer.keys, layer.values = torch.randn(shape), torch.randn(shape)
    return cache


def recurrent(layer) -> bool:
    return hasattr(layer, "states")


def kept(layer) -> list[torch.Tensor]:
    return list(layer.states.values()) if recurrent(layer) else [layer.keys, layer.values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prefill", "decode"])
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30, help="4 or more")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lengths = args.lengths or {"prefill": [1024, 2048, 4096, 8192], "decode": [1024, 4096, 16384]}[args.what]
    {"prefill": prefill, "decode": decode}[args.what](lengths, args.repeat, args.layers)


if __name__ == "__main__":
    main()
