"""Latent attention: what its start costs, what its cache holds. (How fast it decodes: latent_decode.py.)

    python benchmarks/latent.py start                  # of Llama-3.2-1B's shapes, against an SVD of the repeated heads
    python benchmarks/latent.py start --only ours      # the memory of one of the three: repeated, ours, default
    python benchmarks/latent.py cache                  # bytes per token of the published sizes

Weights are drawn: no time here depends on them. Times are CPU seconds of one thread, and variants take turns.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from adapt.conversion.factors import spectrum
from adapt.conversion.latent_shape import LatentShape, TeacherShape, kv_ratio
from adapt.conversion.latent_start import Attention, rope_dims, start_layer

LLAMA_1B = TeacherShape(2048, 32, 8, 64)
STARTS = {
    "repeated": "repeated heads, torch.linalg.svd",
    "ours": "the same factors, ours",
    "default": "our default: dense queries, covariance",
}
BYTES = 2
"""Of a number in bfloat16."""
SIZES = {
    "Llama-3.2-1B": (LLAMA_1B, 16, [(512, 32), (256, 32), (128, 32), (64, 32), (48, 32)]),
    "Llama-3.2-3B": (TeacherShape(3072, 24, 8, 128), 28, [(816, 64), (448, 64), (128, 64), (96, 64)]),
    "Llama-3.1-8B": (TeacherShape(4096, 32, 8, 128), 32, [(256, 64), (160, 64), (128, 64)]),
    "SmolLM-135M": (TeacherShape(576, 9, 3, 64), 30, [(160, 32), (16, 32)]),
    "SmolLM-360M": (TeacherShape(960, 15, 5, 64), 32, [(288, 32), (48, 32)]),
    "SmolLM-1.7B": (TeacherShape(2048, 32, 32, 64), 24, [(2016, 32), (480, 32)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    starts = verbs.add_parser("start")
    starts.add_argument("--layers", type=int, default=16)
    starts.add_argument("--only", choices=STARTS)
    verbs.add_parser("cache")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"start": lambda: start(args.layers, args.only), "cache": cache}[args.verb]()


def start(layers: int, only: str | None) -> None:
    """CPU seconds of the decompositions of all layers; each layer is decomposed by all variants in turn."""
    shape, seconds = LLAMA_1B, {name: [] for name in (STARTS if only is None else [only])}
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    torch.manual_seed(0)
    for _ in range(layers):
        q, k, v = (0.02 * torch.randn(n, shape.hidden) for n in (queries, keys, keys))
        x = torch.randn(4096, shape.hidden)
        covariance = (x.T @ x).double() / len(x)
        variants = {
            "repeated": lambda q=q, k=k, v=v: repeated(q, k, v, shape),
            "ours": lambda q=q, k=k, v=v: (spectrum(q), spectrum(torch.cat([k, v]))),
            "default": lambda q=q, k=k, v=v, c=covariance: start_layer(
                Attention(q, k, v, q.T), shape, rope_dims("high", 64, 32, 32), "pca", c
            ).weights(128),
        }
        for name, taken in seconds.items():
            taken.append(timed(variants[name]))
    base = next(iter(seconds.values()))
    for name, taken in seconds.items():
        ratios = sorted(theirs / ours for theirs, ours in zip(base, taken, strict=True))
        print(
            f"{STARTS[name]:40s} {sum(taken):7.2f} s for {layers} layers, {sum(base) / sum(taken):5.2f} x "
            f"(by layer: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f})"
        )
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def repeated(q, k, v, shape: TeacherShape):
    """As the paper's equations say it."""
    groups = shape.heads // shape.kv_heads
    heads = [t.unflatten(0, (shape.kv_heads, -1)).repeat_interleave(groups, 0).flatten(0, 1) for t in (k, v)]
    return torch.linalg.svd(q, full_matrices=False), torch.linalg.svd(torch.cat(heads), full_matrices=False)


def cache() -> None:
    for name, (teacher, layers, sizes) in SIZES.items():
        whole = teacher.cache * layers * BYTES
        print(f"{name:14s} attention {whole:9,} bytes per token")
        for rank, rope in sizes:
            layer = LatentShape(rank, teacher.head_dim - rope, rope, teacher.head_dim)
            share = kv_ratio([layer] * layers, teacher)
            print(
                f"{'':14s} {rank:4d} + {rope:2d}  {layer.cache * layers * BYTES:9,}  {share:7.2%}  {1 / share:5.2f} x less"
            )


def timed(call: Callable) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
