"""Stages of made-up shapes: what a base has is stated, and nothing is read."""

from __future__ import annotations

from typing import Any

from adapt.config.load import resolve
from adapt.config.schema import Recipe
from adapt.plan.cluster import Cluster
from adapt.plan.read import stage_plan, student_config, teacher_config
from adapt.plan.stage import StagePlan

ARCH = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,  # no multiple of the ranks: its rows are padded
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
MORE = {
    "next_token": {},
    "block_diffusion": {"objective": {"name": "block_diffusion", "block_size": 8}, "conversions": ["mask_token"]},
}


def recipe_of(arch: dict[str, Any] | None = None, conversions: list | None = None, **over: Any) -> Recipe:
    """Next-token training of a small Llama; `over` replaces sections."""
    sections: dict[str, Any] = {
        "run": {"name": "planned"},
        "model": {"base": "nowhere/at-all", "arch": ARCH | (arch or {}), "conversions": conversions or []},
        "data": {"train": [{"source": {"name": "jsonl", "path": "none.jsonl"}}], "seq_len": 64},
        "objective": "next_token",
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "schedule": "cosine",
        "trainer": {"steps": 10, "batch_tokens": 64 * 512},
    }
    for key, value in over.items():
        sections[key] = {**sections[key], **value} if key in ("data", "trainer", "model") else value
    return resolve(sections).recipe


def cluster_of(gpus: int, memory: float = 80.0, **over: Any) -> Cluster:
    given = {"per_node": min(8, gpus), "gpu": "h100", "efficiency": 0.4, "reserve": 4.0, "network": 0.7} | over
    return Cluster(gpus, memory, **given)


def planned(recipe: Recipe, gpus: int, memory: float = 80.0, **over: Any) -> StagePlan:
    notes: list[str] = []
    teacher = teacher_config(recipe, notes)
    return stage_plan("", recipe, cluster_of(gpus, memory, **over), student_config(recipe, notes), teacher)
