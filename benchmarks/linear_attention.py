"""Recurrent layers against softmax attention on a CPU: prefill, forward and backward, decoding, memory.

    python benchmarks/linear_attention.py                     # one layer of SmolLM2-135M's shape, 1K to 16K tokens
    python benchmarks/linear_attention.py --lengths 1024 32768 --repeat 1

One thread, float32, one row. Times are **process CPU-seconds**, the least of a few repeats, so that a busy machine does
not change them much. A layer here is what stands between the projections: rotary embedding and SDPA for attention;
convolutions, feature maps, decays and the recurrence for the others.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

from adapt.models.blocks import blocks
from adapt.models.configuration_adapted import AdaptedConfig
from adapt.models.linear_attention import recurrent
from adapt.models.linear_mixer import in_pieces
from adapt.models.modeling_adapted import MIXERS
from adapt.models.tokens import Tokens

HEADS, GROUPS, HEAD_DIM, HIDDEN = 9, 3, 64, 576
LAYERS = {
    "lawcat": ("gated_linear", {}),
    "lawcat, exact": ("gated_linear", {"exact": True}),
    "lawcat, one decay a head": ("gated_linear", {"gate": "head"}),
    "mamba2": ("mamba2", {}),
}


def recurrence(name: str):
    """The module of a layer that was trained a little."""
    mixer, options = LAYERS[name]
    config = AdaptedConfig(
        num_hidden_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        token_mixers=[mixer], mixer_options={mixer: options},
    )  # fmt: skip
    module = MIXERS[mixer](config, 0).recurrence
    for part in module.modules():
        if hasattr(part, "initialise"):
            part.initialise()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def inputs(length: int):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, n, HEAD_DIM) for n in (HEADS, GROUPS, GROUPS))
    return torch.randn(1, length, HIDDEN), q, k, v


def softmax(length: int):
    _, q, k, v = inputs(length)
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[None] for f in (torch.cos, torch.sin))

    def run():
        a, b = blocks("llama").apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return F.scaled_dot_product_attention(a, b, v.transpose(1, 2), is_causal=True, enable_gqa=True)

    return run


def linear(name: str, length: int, gradients: bool = False):
    module, (x, q, k, v) = recurrence(name), inputs(length)

    def run():
        heads, _ = in_pieces(module, x, q, k, v, ((), None), Tokens(), None)
        if gradients:
            heads.square().mean().backward()
        return heads

    return run


def cost(run, repeat: int, gradients: bool = False) -> float:
    best = float("inf")
    with torch.set_grad_enabled(gradients):
        for _ in range(repeat):
            started = time.process_time()
            run()
            best = min(best, time.process_time() - started)
    return best


def prefill(lengths: list[int], repeat: int) -> None:
    print("\nPrefill of one layer, CPU-seconds (times SDPA's speed)\n")
    print(f"| tokens | SDPA | {' | '.join(LAYERS)} |")
    print(f"|---|---|{'---|' * len(LAYERS)}")
    for length in lengths:
        base = cost(softmax(length), repeat)
        ours = [cost(linear(name, length), repeat) for name in LAYERS]
        cells = " | ".join(f"{t:.3f} ({base / t:.2f}x)" for t in ours)
        print(f"| {length:,} | {base:.3f} | {cells} |", flush=True)


def training(repeat: int, length: int = 2048) -> None:
    """Against the recurrence token by token, which is what flash-linear-attention's `naive_recurrent_gla` does in
    torch."""
    print(f"\nForward and backward of the recurrence itself, {length:,} tokens, CPU-seconds\n")
    from adapt.models.linear_attention import chunked, floor

    torch.manual_seed(0)
    q, k = (torch.randn(1, HEADS, length, HEAD_DIM).softmax(-1) for _ in range(2))
    v, g = torch.randn(1, HEADS, length, HEAD_DIM + 1), -torch.rand(1, HEADS, length, HEAD_DIM).clamp_max(-floor(64))
    leaves = [t.requires_grad_() for t in (q, k, v, g)]

    def of(form):
        return lambda: form(*leaves)[0].square().mean().backward()

    naive = cost(of(recurrent), 1, gradients=True)
    print("| form | CPU-seconds | |\n|---|---|---|")
    print(f"| token by token | {naive:.2f} | 1x |", flush=True)
    for name, exact in (("exact chunks", True), ("fast chunks", False)):
        took = cost(of(lambda *a, exact=exact: chunked(*a, chunk=64, exact=exact)), repeat, gradients=True)
        print(f"| {name} | {took:.2f} | {naive / took:.1f}x |", flush=True)


@torch.no_grad()
def decoding(repeat: int, tokens: int = 32) -> None:
    print("\nDecoding with one layer, CPU-milliseconds a token and bytes of state, after a prompt\n")
    print("| layer | 1K | 4K | 16K |\n|---|---|---|---|")
    for name in ("lawcat", "mamba2"):
        module, cells = recurrence(name), []
        for length in (1024, 4096, 16384):
            x, q, k, v = inputs(length)
            _, states = module(x, q, k, v, None, Tokens(), None)
            x, q, k, v = inputs(1)

            def run(states=states, module=module, step=(x, q, k, v)):
                for _ in range(tokens):
                    _, states = module(*step, None, Tokens(), states)

            size = sum(s.numel() * s.element_size() for s in states.values())
            cells.append(f"{1000 * cost(run, repeat) / tokens:.2f} ms, {size:,} B")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeat", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    softmax(256)()  # the first call of a process pays for all
    linear("lawcat", 256)()
    prefill(chosen.lengths, chosen.repeat)
    training(chosen.repeat)
    decoding(chosen.repeat)


if __name__ == "__main__":
    main()
