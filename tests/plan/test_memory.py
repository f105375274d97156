"""The plan's memory against torch's tracker, which follows every storage of a microbatch on fake ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from adapt.plan.fake import fake_ranks, observe
from adapt.plan.memory import moments
from tests.plan.stages import planned, recipe_of

WIDE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
ROWS, LENGTH = 4, 1024
CHECKPOINTED = {"trainer": {"activation_checkpointing": True}}
LATENT = {"name": "xecomla", "latent_norm": "none", "kv_rank": 128, "q_rank": 512}
LORA = {"trainable": {"lora": {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}}}
CASES = {
    "llama": {},
    "llama, checkpointed": CHECKPOINTED,
    "tied": {"arch": {"tie_word_embeddings": True}},
    "qwen3": {"arch": {"model_type": "qwen3", "head_dim": 64}},
    "block diffusion": {"conversions": [{"name": "mask_token", "id": 999}], "objective": {"name": "block_diffusion"}},
    "adapters": LORA,
    "latent": {"conversions": [LATENT]},
    "latent blocks": {
        "conversions": [LATENT], "objective": {"name": "layer_alignment", "mixer": 0.0, "block": 1.0},
        "trainable": {"include": ["*.layers.*"]}, "teacher": {"base": "self"},
    },
    "taught": {"objective": "logit_distillation", "teacher": {"base": "self", "dtype": "bfloat16"}},
    "gated linear": {"conversions": ["lawcat"]},
    "gated linear, adapters alone": {
        "conversions": ["lawcat"], "trainable": {"include": ["*lora_*"], "lora": LORA["trainable"]["lora"]},
    },
    "mamba2, adapters alone": {
        "conversions": ["mamba2"], "trainable": {"include": ["*lora_*"], "lora": LORA["trainable"]["lora"]},
    },
    "mamba2": {"conversions": ["mamba2"]},
    "selective": {"trainer": {"activation_checkpointing": "selective"}},
    "preferences": {"objective": "dpo"},
    "preferences, taught": {"objective": {"name": "dpo", "reference": "teacher"}, "teacher": {"base": "self"}},
}  # fmt: skip


def both(case: dict, compute: torch.dtype) -> tuple[float, float]:
    """(planned, tracked) bytes, without the optimizer."""
    case = case | {"arch": WIDE | case.get("arch", {}), "data": {"seq_len": LENGTH}}
    plan = planned(recipe_of(**case), 8)
    with fake_ranks(8) as world:
        teacher = plan.teacher and plan.teacher.config
        seen = observe(plan.recipe, plan.student.config, teacher, world, rows=ROWS, compute=compute)
    setup = dataclasses.replace(plan.setup, device="cpu", compute=compute.itemsize)
    found = moments(plan.student, plan.teacher, plan.work, plan.optimizer, setup, ROWS, accumulated=False)
    return max(m.total - m.kinds["optimizer"] for m in found), seen.memory["Total"]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_planned_memory_is_what_a_tracker_finds(case, compute):
    formula, tracked = both(CASES[case], compute)
    assert formula == pytest.approx(tracked, rel=0.1), f"{formula / tracked - 1:+.1%}"


def test_attention_transfer_needs_one_layers_activations_however_many_there_are():
    """torch's tracker cannot follow gradients formed on the way forward; benchmarks/steps.py measures them."""
    planned_of = {}
    for layers in (2, 8):
        case = {
            "conversions": ["lawcat"],
            "objective": "attention_transfer",
            "trainable": {"include": ["*.recurrence.*"]},
        }
        plan = planned(recipe_of(**case, arch=WIDE | {"num_hidden_layers": layers}, data={"seq_len": LENGTH}), 8)
        found = moments(plan.student, plan.teacher, plan.work, plan.optimizer, plan.setup, ROWS)
        planned_of[layers] = {m.name: m.kinds.get("activations", 0.0) for m in found}
    assert planned_of[2] == planned_of[8]
    assert planned_of[2]["loss"] == 0 < planned_of[2]["last layer"]
