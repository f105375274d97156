"""Latent attention: what its start costs, what its cache holds, how fast it decodes.

    python benchmarks/latent.py start                  # of Llama-3.2-1B's shapes, against an SVD of the repeated heads
    python benchmarks/latent.py start --only ours      # the memory of one of the three: repeated, ours, default
    python benchmarks/latent.py cache                  # bytes per token of the published sizes
    python benchmarks/latent.py decode --context 1024 4096 16384     # one layer, one token

Weights are drawn: no time here depends on them. Times are CPU seconds of one thread, and variants take turns.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
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
    decodes = verbs.add_parser("decode")
    decodes.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 16384])
    decodes.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    {
        "start": lambda: start(args.layers, args.only),
        "cache": cache,
        "decode": lambda: decode(args.context, args.turns),
    }[args.verb]()


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


def decode(contexts: list[int], turns: int) -> None:
    """CPU milliseconds of one token in one layer of Llama-3.2-1B's shape with `context` tokens in the cache, fp32: the
    teacher's grouped attention, and a latent of 12.5 % and 50 % as transformers decodes it (expanded anew) and absorbed."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    from adapt.models.latent_attention import LatentAttention, LatentSpec

    shape = LLAMA_1B
    rope = {"rope_theta": 500000.0, "rope_type": "default"}
    llama = AutoConfig.for_model(
        "llama", hidden_size=shape.hidden, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, rope_parameters=rope, max_position_embeddings=131072,
    )  # fmt: skip
    llama._attn_implementation = "sdpa"
    torch.manual_seed(0)
    x = torch.randn(1, 1, shape.hidden)
    for context in contexts:
        place = torch.tensor([[context]])
        variants: dict[str, Callable] = {}
        theirs = LlamaAttention(llama, 0).eval()
        turn = LlamaRotaryEmbedding(llama)(x, place)
        held = [torch.randn(1, shape.kv_heads, context, shape.head_dim) for _ in range(2)]
        variants["grouped attention, transformers"] = lambda m=theirs, t=turn, h=held: partial(
            m, x, t, None, past_key_values=Held(*h)
        )
        for share, rank in ((0.125, 96), (0.5, 480)):
            spec = LatentSpec(
                hidden_size=shape.hidden, num_heads=shape.heads, kv_rank=rank, nope_dim=32, rope_dim=32, v_dim=64, rope=rope
            )  # fmt: skip
            ours = LatentAttention(spec, 0).eval()
            deepseek = AutoConfig.for_model(
                "deepseek_v3", hidden_size=shape.hidden, num_attention_heads=shape.heads, kv_lora_rank=rank,
                num_key_value_heads=shape.heads, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
                rope_parameters=rope, max_position_embeddings=131072,
            )  # fmt: skip
            deepseek._attn_implementation = "sdpa"
            stock = DeepseekV3Attention(deepseek, 0).eval()
            stock.load_state_dict(ours.state_dict())
            turn = DeepseekV3RotaryEmbedding(deepseek)(x, place)
            held = torch.randn(1, 1, context, rank), torch.randn(1, 1, context, 32)
            variants[f"latent {share:.1%}, transformers"] = lambda m=stock, t=turn, h=held: partial(
                m, x, t, None, past_key_values=Held(*h)
            )
            variants[f"latent {share:.1%}, absorbed"] = lambda m=ours, p=place, h=held: partial(
                m, x, p, past_key_values=Held(*h)
            )
        best = dict.fromkeys(variants, float("inf"))
        for _ in range(turns):
            for name, prepare in variants.items():
                with torch.inference_mode():
                    best[name] = min(best[name], timed(prepare()))
        for name, seconds in best.items():
            print(f"context {context:6d}  {name:34s} {1000 * seconds:9.2f} ms")


class Held:
    """A cache of one layer with tokens in it. A step appends to it, which copies it, as in transformers."""

    def __init__(self, keys, values):
        from transformers.cache_utils import DynamicLayer

        self.layer = DynamicLayer()
        self.layer.update(keys, values)

    def update(self, keys, values, layer_idx, *args, **kwargs):
        return self.layer.update(keys, values)


def timed(call: Callable) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
