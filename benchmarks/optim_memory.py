"""State of optimizers in bytes: what the formula says for models from 135M to 70B, and what a Suite holds for the smallest.

    python benchmarks/optim_memory.py [--ranks 8] [--rank 64]

Shapes are those of the public configurations. State is counted on meta tensors, so no model is loaded. Formulas, in elements
per m x n matrix: AdamW 2mn, Muon mn, COSMOS mn + (m + n)r + r^2, SOAP 2mn + 2m^2 + 2n^2 (a side above 10,000 is skipped).
With FSDP2 over W ranks COSMOS keeps (mn + mr)/W + nr + r^2 per rank: the basis is on every one of them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@dataclass(frozen=True)
class Shape:
    name: str
    vocabulary: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool


SHAPES = [
    Shape("SmolLM2 135M", 49152, 576, 1536, 30, 9, 3, 64, True),
    Shape("Llama 3.2 1B", 128256, 2048, 8192, 16, 32, 8, 64, True),
    Shape("Llama 2 7B", 32000, 4096, 11008, 32, 32, 32, 128, False),
    Shape("Llama 3 70B", 128256, 8192, 28672, 80, 64, 8, 128, False),
]


def matrices(shape: Shape) -> list[tuple[int, int]]:
    """Rows and columns of the hidden matrices."""
    q, kv, d, f = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.width, shape.mlp
    return [(q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f)] * shape.layers


def adamw_managed(shape: Shape) -> int:
    """Elements of embedding, head and norms."""
    return shape.vocabulary * shape.width * (1 if shape.tied else 2) + (2 * shape.layers + 1) * shape.width


def elements(m: int, n: int, rank: int) -> dict[str, int]:
    r = min(rank, m, n)
    sides = sum(2 * side * side for side in (m, n) if side <= 10000)
    return {"adamw": 2 * m * n, "muon": m * n, "cosmos": m * n + (m + n) * r + r * r, "soap": 2 * m * n + sides}


def per_rank(shape: Shape, rank: int, ranks: int) -> float:
    """COSMOS's elements on each of `ranks`."""
    total = 2 * adamw_managed(shape) / ranks
    for m, n in matrices(shape):
        r = min(rank, m, n)
        total += (m * n + m * r) / ranks + n * r + r * r
    return total


def held(shape: Shape, name: str, rank: int) -> int:
    """Bytes of state of the registered optimizer, on a meta model of this shape; steps (4 bytes each) left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from adapt.components import optimizers

    config = AutoConfig.for_model(
        "llama", vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    entry = optimizers[name]
    fields = {"rank": rank} if name == "cosmos" else {}
    optimizer = entry.factory(entry.config_type(**fields), model)
    return sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    wanted = parser.parse_args()
    gib = 2**30
    print(f"{'':14s} {'AdamW':>9s} {'Muon':>9s} {'COSMOS':>9s} {'SOAP':>9s}  {'COSMOS/rank':>11s}   GiB, float32")
    for shape in SHAPES:
        rest, sums = 2 * adamw_managed(shape), dict.fromkeys(("adamw", "muon", "cosmos", "soap"), 0)
        for m, n in matrices(shape):
            for name, count in elements(m, n, wanted.rank).items():
                sums[name] += count
        cells = "".join(f" {4 * (count + rest) / gib:9.3f}" for count in sums.values())
        print(f"{shape.name:14s}{cells}  {4 * per_rank(shape, wanted.rank, wanted.ranks) / gib:11.3f}")
        for name in ("adamw", "cosmos"):
            found, expected = held(shape, name, wanted.rank), 4 * (sums[name] + rest)
            print(f"    {name}: the optimizer holds {found:,} bytes, the formula says {expected:,}")


if __name__ == "__main__":
    main()
