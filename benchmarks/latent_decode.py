"""One token after a long context: latent attention absorbed, as transformers decodes it, and the grouped attention it replaces.

    python benchmarks/latent_decode.py layer                       # one attention layer of SmolLM2-135M's shapes
    python benchmarks/latent_decode.py layer --base llama-3.2-1b
    python benchmarks/latent_decode.py model                       # all layers, embedding to logits

`grouped` is transformers' Llama with SDPA; `expanded` its DeepseekV3, which maps the latents of all tokens to keys and
values at every step; `absorbed` the same parameters as `adapt generate` opens them. Weights are random, and so is what
the caches hold: no time depends on them. One thread, float32, one row. CPU time of the process: variants take turns, and
the ratios are medians over the turns.
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
from adapt.conversion.latent_shape import TeacherShape, rank_for
from adapt.generation.absorb import absorb
from benchmarks.latent import timed

ROPE_DIM = 32
SHARES = (0.125, 0.5)
"""Of the cache of grouped attention."""
BASES = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip


def grouped(base: str, what: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    over = {"num_hidden_layers": 1, "vocab_size": 8} if what == "layer" else {}
    config = AutoConfig.for_model(
        "llama", max_position_embeddings=32768, rope_theta=100000, tie_word_embeddings=True, **BASES[base] | over
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def latent(config, share: float) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Expanded and absorbed, of the same parameters."""
    from transformers import AutoModelForCausalLM

    shape = TeacherShape.of(config)
    rank, rope = rank_for(share, shape, ROPE_DIM), dict(config.rope_parameters)
    made = stock_config(config, rank, shape.head_dim - ROPE_DIM, ROPE_DIM, rope)
    stock = AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").eval()
    return stock, absorb(copy.deepcopy(stock, {id(p): p for p in stock.parameters()}))


@torch.inference_mode()
def decode(base: str, what: str, lengths: list[int], repeat: int) -> None:
    """A step appends to the cache, which copies it, as in transformers, and is taken back."""
    theirs = grouped(base, what)
    pairs = {share: latent(theirs.config, share) for share in SHARES}
    print(f"\n{base}, {what}: CPU ms per token (tokens/s), and the absorbed form's speed over the others'\n")
    print("| tokens | cache | grouped | expanded | absorbed | x grouped | x expanded |\n|---|---|---|---|---|---|---|")
    for length in lengths:
        models = {"grouped": theirs}
        for share, pair in pairs.items():
            models |= {(share, form): model for form, model in zip(("expanded", "absorbed"), pair, strict=True)}
        seconds = in_turn({name: step(model, what, length) for name, model in models.items()}, repeat)
        for share in SHARES:
            times = [seconds["grouped"], seconds[share, "expanded"], seconds[share, "absorbed"]]
            cells = [f"{1000 * median(t):.2f} ({1 / median(t):,.1f})" for t in times]
            gains = [median(a / b for a, b in zip(t, times[-1], strict=True)) for t in times[:-1]]
            cells += [f"{gain:.2f}" for gain in gains]
            print(f"| {length:,} | {share:.1%} | {' | '.join(cells)} |", flush=True)


def in_turn(steps: dict, repeat: int) -> dict:
    """CPU seconds of every turn, without a first one to warm up."""
    seconds: dict = {name: [] for name in steps}
    for turn in range(repeat + 1):
        for name, call in steps.items():
            took = timed(call)
            if turn:
                seconds[name].append(took)
    return seconds


def step(model, what: str, length: int):
    cache = filled(model, length)
    place = torch.tensor([[length]])
    token, x = torch.zeros(1, 1, dtype=torch.long), torch.randn(1, 1, model.config.hidden_size)
    angles = model.model.rotary_emb(x, place)
    layer = model.model.layers[0].self_attn

    def call():
        before = [(held, held.keys, held.values) for held in cache.layers]
        if what == "model":
            model(token, past_key_values=cache, position_ids=place)
        else:
            layer(
                hidden_states=x,
                position_embeddings=angles,
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
    model(torch.zeros(1, 4, dtype=torch.long), past_key_values=cache)
    for held in cache.layers:
        for name in ("keys", "values"):
            rows, heads, _, size = getattr(held, name).shape
            setattr(held, name, torch.randn(rows, heads, length, size))
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layer", "model"])
    parser.add_argument("--base", choices=BASES, default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    decode(args.base, args.what, args.lengths, args.repeat)


if __name__ == "__main__":
    main()
