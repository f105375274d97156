"""A complete tiny recipe: real model classes, real files, seconds to train."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "page",
    "and",
    "learns",
    "what",
    "comes",
    "next",
    "in",
    "every",
    "block",
    "of",
    "noisy",
    "text",
    "while",
    "old",
    "words",
    "stay",
]

COMPONENTS = ("objective", "optimizer", "schedule")


def corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """A JSONL file of made-up sentences."""
    rng = random.Random(seed)
    path = folder / f"corpus-{seed}.jsonl"
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(15, 60))) + "."}) for _ in range(documents)]
    path.write_text("\n".join(lines))
    return path


def preferences(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """A JSONL file of preference pairs: short answers are better than long ones. All fit into 64 tokens."""
    rng = random.Random(seed)

    def words(number: int) -> str:
        return " ".join(rng.choices(WORDS, k=number))

    path = folder / f"pairs-{seed}.jsonl"
    records = [{"prompt": words(3), "chosen": words(2), "rejected": words(rng.randint(4, 6))} for _ in range(count)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def tiny_recipe(base: Path, folder: Path, **over: Any) -> dict[str, Any]:
    """Block diffusion on a tiny Llama: 6 steps of 4 rows of 64 tokens, blocks 2 -> 4 -> 8.

    `over` goes over sections key by key, and replaces components whole.
    """
    recipe: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(folder / "runs"), "seed": 7},
        "model": {"base": str(base), "conversions": [{"name": "mask_token", "token": "<reserved_0>"}]},
        "data": {
            "train": [{"source": {"name": "jsonl", "path": str(corpus(folder))}, "name": "train"}],
            "eval": [{"source": {"name": "jsonl", "path": str(corpus(folder, 12, seed=1))}, "name": "held-out"}],
            "seq_len": 64,
        },
        "objective": {
            "name": "block_diffusion",
            "block_size": 8,
            "growth": {"name": "geometric", "start": 2, "every": 2},
        },
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "schedule": {"name": "cosine", "warmup": 0.34},
        "trainer": {"steps": 6, "batch_tokens": 256, "microbatch": 2},
        "evaluation": {"suites": ["bpb", "masked_ce"], "limit": 4},
        "generation": {
            "prompts": ["the model"],
            "max_new_tokens": 12,
            "samplers": ["ar", {"name": "block_diffusion", "threshold": 0.9}],
        },
        "logging": {"tensorboard": False},
        "export": {"dtype": "float32"},
    }
    for key, value in over.items():
        recipe[key] = {**recipe.get(key, {}), **value} if key not in COMPONENTS else value
    return recipe
