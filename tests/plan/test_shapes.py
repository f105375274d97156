from __future__ import annotations

import pytest
import torch

from adapt.config import load, shipped_recipes
from adapt.config.schema import Lora
from adapt.conversion.layer_map import register_student
from adapt.conversion.mixers import created_parameters
from adapt.models.configuration_adapted import AdaptedConfig
from adapt.optim.routing import roles
from adapt.plan.shapes import weights_of, with_adapters
from adapt.pretrained.check import inspect_base
from adapt.pretrained.lora import add_lora
from tests.tiny import FAMILIES, tiny_config

LATENT = {"kv_rank": 16, "nope_dim": 4, "rope_dim": 4, "v_dim": 8, "rope": {"rope_theta": 1e4}}
STUDENTS = {
    "gated": (dict.fromkeys((0, 1), "gated_linear"), {}),
    "gated by heads, untied maps": (
        {0: "gated_linear"},
        {"gated_linear": {"gate": "head", "gate_rank": None, "tied": False, "features": 6}},
    ),
    "mamba2": ({1: "mamba2"}, {"mamba2": {"norm": False}}),
    "latent": ({0: "latent"}, {"latent": LATENT}),
    "latent, low-rank queries and biases": (
        dict.fromkeys((0, 1), "latent"),
        {"latent": LATENT | {"q_rank": 16, "kv_norm": False, "q_bias": True, "kv_bias": True, "o_bias": True}},
    ),
    "latent, ranks by layer": (dict.fromkeys((0, 1), "latent"), {"latent": LATENT | {"kv_rank": [16, 24]}}),
}


def on_meta(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def assert_the_same(config, lora: Lora | None = None) -> None:
    model = on_meta(config)
    found = {w.name: w for w in with_adapters(weights_of(config), lora)}
    created = created_parameters(model)
    if lora is not None:
        model = add_lora(model, lora)
    assert {n: w.shape for n, w in found.items()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n: w.role for n, w in found.items()} == roles(model)
    assert {n for n, w in found.items() if w.created} == created
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {n for n, w in found.items() if w.linear} == linear & found.keys()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family(family, tied):
    assert_the_same(tiny_config(family, tie_word_embeddings=tied))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_biases_that_a_config_asks_for(family):
    more = {"mlp_bias": True} if family == "llama" else {}
    assert_the_same(tiny_config(family, attention_bias=True, **more))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_parameter_of_a_student(student, family):
    register_student()
    assert_the_same(AdaptedConfig.of(tiny_config(family), *STUDENTS[student]))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("q_rank", [None, 16])
def test_every_parameter_of_a_dense_deepseek(q_rank, biases):
    from adapt.conversion.latent_config import stock_config

    config = stock_config(tiny_config("llama"), 16, 4, 4, {"rope_theta": 1e4, "rope_type": "default"}, biases=biases)
    config.q_lora_rank = q_rank
    assert_the_same(config)


@pytest.mark.parametrize("rank", [4, 16])
def test_adapters_beside_what_a_conversion_created(rank):
    register_student()
    student = AdaptedConfig.of(tiny_config("qwen2"), {0: "gated_linear"}, {})
    assert_the_same(student, Lora(rank=rank, targets=("q_proj", "down_proj")))


@pytest.mark.parametrize("vocab", [256, 1000])
def test_pruned_and_extended_vocabularies(vocab):
    assert_the_same(tiny_config("llama", vocab_size=vocab))


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_parameter_of_a_shipped_recipe(name):
    resolved = load(name, [])
    for recipe in (r for run in (list(resolved.arms.values()) or [resolved]) for r in run.stages[:1]):
        found = inspect_base(recipe, offline=True)
        assert_the_same(found.config, recipe.trainable.lora)
