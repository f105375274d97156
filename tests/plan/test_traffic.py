"""The formula against our own modules under our own wrapping, on a fake process group."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adapt.plan import arithmetic
from adapt.plan.fake import Seen, built, fake_ranks, observe, one_kernel
from tests.plan.stages import MORE, planned, recipe_of

LORA = {"lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}}
TRANSFER = {"conversions": [{"name": "lawcat", "layers": [0, 2]}], "objective": "attention_transfer"}
ALIGNED = {
    "conversions": [{"name": "lawcat", "layers": [0, 2]}],
    "trainable": {"include": ["*.layers.*"]},
    "teacher": {"base": "self"},
}
CASES = {
    "next_token": {},
    "tied": {"arch": {"tie_word_embeddings": True}},
    "block diffusion": {"conversions": [{"name": "mask_token", "id": 999}], "objective": {"name": "block_diffusion", "block_size": 8}},
    "checkpointed": {"trainer": {"activation_checkpointing": True}},
    "two copies of the model": {"trainer": {"mesh": {"replicate": 2}}},
    "adapters": {"trainable": LORA},
    "the last layer": {"trainable": {"include": ["model.layers.2.*"]}},
    "embedding and head": {"trainable": {"include": ["*embed_tokens*", "*lm_head*"]}},
    "a teacher": {"objective": "logit_distillation", "teacher": {"base": "self", "dtype": "bfloat16"}},
    "a teacher for suites": {"teacher": {"base": "self"}, "evaluation": {"suites": ["kl_to_base"]}},
    "another teacher": {
        "objective": {"name": "logit_distillation", "ce": 0.1},
        "teacher": {"base": "nowhere/else", "arch": {"model_type": "llama", "hidden_size": 96, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000,
            "max_position_embeddings": 512, "tie_word_embeddings": True}},
    },
    "layers that learn by themselves": TRANSFER | {"trainable": {"include": ["*.recurrence.*"]}},
    "mixers that learn from a teacher's": ALIGNED | {"objective": "layer_alignment"},
    "blocks that learn from a teacher's": ALIGNED | {"objective": {"name": "layer_alignment", "mixer": 0.0, "block": 1.0}},
    "preferences": {"objective": "dpo", "trainer": {"microbatch": 2}},
    "preferences, taught": {"objective": {"name": "dpo", "reference": "teacher"}, "teacher": {"base": "self"}},
    "selective": {"trainer": {"activation_checkpointing": "selective"}},
    "offloaded": {"trainer": {"activation_checkpointing": "offload", "mesh": {"offload": True}}},
    "a latent student": {"conversions": [{"name": "xecomla", "latent_norm": "none", "q_rank": 32, "kv_rank": 32}]},
    "qwen2": {"arch": {"model_type": "qwen2"}},
    "qwen3": {"arch": {"model_type": "qwen3"}},
}  # fmt: skip


def seen(recipe, gpus: int, compute: torch.dtype = torch.bfloat16) -> tuple:
    plan = planned(recipe, gpus)
    rows = plan.work.unit
    with fake_ranks(gpus) as world:
        return plan, observe(
            recipe, plan.student.config, plan.teacher and plan.teacher.config, world, rows=rows, compute=compute
        )


def assert_to_the_byte(plan, found: Seen) -> None:
    assert {s.kind: s.count for s in plan.sent} == found.counts
    assert {s.kind: s.bytes for s in plan.sent} == found.bytes
    assert plan.student.parameters() == found.parameters


@pytest.mark.parametrize("case", CASES)
def test_collectives_are_the_formula_to_the_byte(case):
    assert_to_the_byte(*seen(recipe_of(**CASES[case]), 12))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("policy", [False, True, "selective"])
def test_products_with_weights_are_those_of_the_formula(policy, family):
    trainer = {"activation_checkpointing": policy, "precision": "fp32"}
    plan, found = seen(recipe_of(arch={"model_type": family}, trainer=trainer), 4, torch.float32)
    dims = plan.student.dims
    attention = (
        dims.layers * 4 * plan.work.pairs * dims.H * dims.d
    )  # an operation of its own, which is not counted there
    attention *= 4 if policy is True else 3
    logits = 3 * 2 * dims.V * dims.D * plan.work.seq_len  # those of linear_cross_entropy, an operation of its own
    assert plan.arithmetic.total - attention - logits == found.flops


@pytest.mark.parametrize("policy", [False, True, "selective"])
@pytest.mark.parametrize("objective", ["next_token", "block_diffusion"])
def test_a_real_step_executes_the_operations_of_the_formula(objective, policy):
    """FlopCounterMode over one row on one rank: chunked head in bfloat16, noisy and clean copy, recomputation. It counts no
    attention of CPUs, and not the logits of the forward pass, which are formed in an operation of their own; it does count
    those that the backward pass forms once more."""
    case = MORE[objective] | {"conversions": [{"name": "mask_token", "id": 999}]} if objective != "next_token" else {}
    recipe = recipe_of(**case, trainer={"activation_checkpointing": policy, "precision": "bf16"})
    plan = planned(recipe, 1)
    with fake_ranks(1) as world:
        root, objective, prepared = built(recipe, plan.student.config, None, world, rows=1, compute=torch.bfloat16)
        root.to_empty(device="cpu")
        for parameter in root.parameters():
            torch.nn.init.normal_(parameter, 0, 0.02)
        with one_kernel(prepared), FlopCounterMode(display=False) as counter:
            found = root.train()(objective, prepared.inputs)
            sum(prepared.terms[n].weight * found[n] for n in prepared.terms).backward()
    scored = sum(len(prepared.inputs[f"{n}/target"]) for n in prepared.terms) if case else recipe.data.seq_len - 1
    work = dataclasses.replace(plan.work, pairs=0.0, scored=scored / recipe.data.seq_len)
    formula = arithmetic.of_row(plan.student, None, work, plan.setup).total
    logits = 2 * plan.student.dims.V * plan.student.dims.D * scored
    assert formula - logits == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "cosmos", "soap", "adamw8bit"])
def test_the_optimizer_keeps_what_it_says(optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
    plan, found = seen(recipe_of(arch={"num_hidden_layers": 1}, optimizer={"name": optimizer, "lr": 1e-4}), 12)
    assert plan.optimizer.state == found.state


LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip


@pytest.mark.parametrize("replicate", [1, 8])
def test_8b_on_64_ranks(replicate):
    recipe = recipe_of(arch=LLAMA_8B, trainer={"mesh": {"replicate": replicate}, "activation_checkpointing": True})
    assert_to_the_byte(*seen(recipe, 64))


@pytest.mark.slow
@pytest.mark.parametrize("replicate", [1, 8])
def test_70b_on_512_ranks(replicate):
    recipe = recipe_of(arch=LLAMA_70B, trainer={"mesh": {"replicate": replicate}, "activation_checkpointing": True})
    assert_to_the_byte(*seen(recipe, 512))
