"""From attention to recurrences: what stays, what starts, and what is refused (LAWCAT spec, invariants 11 and 14)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from adapt.conversion.base import apply_conversions, plan_conversions
from adapt.conversion.lawcat import Lawcat, LawcatConfig
from adapt.conversion.layer_map import chosen_layers
from adapt.conversion.mixers import created_parameters, learning_layers
from adapt.errors import UserError
from adapt.pretrained import load_config, load_model, load_tokenizer
from tests import tiny
from tests.models.linear import ids
from tests.pretrained.recipes import recipe

LAYER = {"lawcat": "gated_linear", "mamba2": "mamba2"}


def converted(base, *conversions, **over):
    made = recipe(base, conversions=conversions, dtype="float32", **over)
    model, tokenizer = load_model(made), load_tokenizer(made)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    return made, before, apply_conversions(made, model, tokenizer)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", LAYER)
def test_invariant_11_every_teacher_tensor_stays(family, name, tmp_path):
    """Bit for bit, of a model from disk and of one made from a config; and only the mixer's own tensors are new."""
    made, before, student = converted(tiny.save_tiny(tmp_path, family), {"name": name, "layers": [0]})
    after = student.state_dict()
    assert all(torch.equal(after[key], weight) for key, weight in before.items())
    created = created_parameters(student)
    assert {f"model.layers.0.self_attn.recurrence.{end}" for end in ("q_conv.weight", "A_log")} & created
    assert after.keys() - before.keys() == created
    assert not any(p.is_meta for p in student.parameters())
    assert all(torch.isfinite(after[key]).all() for key in created)
    assert student.config.token_mixers == [LAYER[name], "attention"]
    assert learning_layers(student) == (0,)
    planned, _ = plan_conversions(made, load_config(made.model), load_tokenizer(made))
    assert {k: v for k, v in planned.to_dict().items() if k != "dtype"} == {
        k: v for k, v in student.config.to_dict().items() if k != "dtype"
    }


def test_invariant_11_for_a_model_made_from_a_config():
    model = tiny.tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    after = Lawcat(LawcatConfig(), seed=0).apply(model, None).state_dict()
    assert all(torch.equal(after[key], weight) for key, weight in before.items())


def test_a_lawcat_layer_starts_as_its_paper_says(tmp_path):
    _, _, student = converted(tiny.save_tiny(tmp_path), {"name": "lawcat", "gate_bias": 6})
    r = student.model.layers[0].self_attn.recurrence
    for conv in (r.q_conv, r.k_conv):
        assert conv.weight.shape == (32, 1, 4)
        assert torch.equal(conv.weight[..., -1], torch.ones(32, 1))
        assert torch.equal(conv.weight[..., :-1], torch.full((32, 1, 3), 1e-3))
    assert torch.equal(r.q_map.weight, torch.eye(8, 4).expand(4, 8, 4))
    assert r.k_map is None
    assert r.gate.down.shape == (16, 32)
    assert r.gate.up.shape == (16, 16)
    assert 0.005 < float(torch.cat([r.gate.down.flatten(), r.gate.up.flatten()]).detach().std()) < 0.007
    half_life = math.log(0.5) / float(r.log_decays(torch.zeros(1, 1, 32)).detach().mean())
    assert half_life == pytest.approx(4480, rel=0.01)


def test_the_start_is_the_same_on_every_rank(tmp_path):
    """Seeded by run.seed, whatever was drawn before."""
    base = tiny.save_tiny(tmp_path)
    first = converted(base, {"name": "lawcat"})[2].state_dict()
    torch.rand(5)
    assert all(torch.equal(first[k], w) for k, w in converted(base, {"name": "lawcat"})[2].state_dict().items())


def test_a_norm_starts_at_the_size_of_the_teachers_heads(tmp_path):
    base = tiny.save_tiny(tmp_path)
    norm = converted(base, {"name": "mamba2", "layers": "all"})[2].model.layers[1].self_attn.recurrence.norm
    assert norm.shape == (4, 8)
    assert torch.equal(norm, norm[:, :1].expand(4, 8))
    assert len(set(norm[:, 0].tolist())) == 4
    published = converted(base, {"name": "mamba2", "layers": "all", "init": "mamba_in_llama"})[2]
    recurrence = published.model.layers[1].self_attn.recurrence
    assert torch.equal(recurrence.norm, torch.ones(4, 8))
    assert recurrence.conv.silu
    step = torch.nn.functional.softplus(recurrence.dt_bias)
    assert ((step > 9e-4) & (step < 0.11)).all()
    assert ((recurrence.A_log >= 0) & (recurrence.A_log <= math.log(16))).all()


def test_conversions_follow_each_other(tmp_path):
    _, before, student = converted(
        tiny.save_tiny(tmp_path, num_hidden_layers=4),
        {"name": "lawcat", "layers": [0]},
        {"name": "mamba2", "layers": [2]},
    )
    assert student.config.token_mixers == ["gated_linear", "attention", "mamba2", "attention"]
    assert student.config.layer_types == ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    after = student.state_dict()
    assert all(torch.equal(after[key], weight) for key, weight in before.items())
    assert torch.isfinite(student(ids(1, 20)).logits).all()


def test_nothing_is_read_on_the_meta_device():
    with torch.device("meta"):
        model = tiny.tiny_model()
    student = Lawcat(LawcatConfig(), seed=0).apply(model, None)
    assert all(p.is_meta for p in student.parameters())


@pytest.mark.parametrize(
    ("layers", "keep", "expected"),
    [
        ("all", "none", range(8)),
        ([5, 1], "none", [1, 5]),
        ("every_2", "none", [0, 2, 4, 6]),
        ("all", "every_4", [0, 1, 2, 4, 5, 6]),
        ("every_2", [4], [0, 2, 6]),
    ],
)
def test_layer_maps(layers, keep, expected):
    assert chosen_layers(layers, keep, 8) == tuple(expected)


REFUSED = {
    "an id out of range": ({"name": "lawcat", "layers": [0, 7]}, r"layers.*no layer 7: the model has 2, from 0 to 1"),
    "an id below zero": ({"name": "mamba2", "layers": [-1]}, "no layer -1"),
    "an id twice": ({"name": "lawcat", "layers": [1, 1]}, "names a layer twice"),
    "a map of another name": ({"name": "lawcat", "layers": "some"}, "'some' is no layer map: give all"),
    "every 0th": ({"name": "lawcat", "layers": "every_0"}, "is no layer map"),
    "nothing left": ({"name": "lawcat", "keep": "all"}, "nothing is left to convert of 2 layers"),
    "features of a channel gate": ({"name": "lawcat", "features": 3}, r"8 channels, and 3 features make 6 keys"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(case, tiny_base):
    conversion, words = REFUSED[case]
    made = recipe(tiny_base, conversions=[conversion])
    with pytest.raises(UserError, match=words) as refused:
        plan_conversions(made, load_config(made.model), None)
    assert all(p.where.startswith("model.conversions[0]") for p in refused.value.problems)
    with pytest.raises(UserError, match=words):
        apply_conversions(made, load_model(made), load_tokenizer(made))


def test_a_layer_is_converted_once(tiny_base):
    made = recipe(tiny_base, conversions=[{"name": "lawcat", "layers": [0]}, {"name": "mamba2", "layers": "all"}])
    with pytest.raises(UserError, match=r"conversions\[1\]\.layers: layer 0 is gated_linear already"):
        plan_conversions(made, load_config(made.model), None)


def test_all_layers_of_a_kind_have_the_same_settings(tiny_base):
    two = [{"name": "lawcat", "layers": [0]}, {"name": "lawcat", "layers": [1], "gate": "head"}]
    made = recipe(tiny_base, conversions=two)
    with pytest.raises(UserError, match="has gated_linear layers with other settings already"):
        plan_conversions(made, load_config(made.model), None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sliding_window": 128}, "a sliding window of 128 tokens"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0"),
        ({"attention_sink": True}, "attention sinks are not supported"),
        ({"model_type": "gpt2"}, "gpt2 family is not supported: learned absolute positions"),
    ],
)
def test_attention_that_has_no_counterpart_is_refused(fields, words):
    config = tiny.tiny_config("mistral")
    stated = SimpleNamespace(**{**config.to_dict(), **fields})
    with pytest.raises(UserError, match=words):
        Lawcat(LawcatConfig(), seed=0).plan(stated, None)


@pytest.mark.parametrize("name", LAYER)
def test_objectives_that_look_ahead_are_refused(name, tmp_path):
    from adapt.config import resolve
    from adapt.train.validate import problems
    from tests.recipes import tiny_recipe

    base = tiny.save_tiny(tmp_path / "base")
    both = [{"name": "mask_token", "token": "<reserved_0>"}, {"name": name, "layers": "all"}]
    found = problems(resolve(tiny_recipe(base, tmp_path, model={"conversions": both})))
    assert [p.where for p in found if "looks both ways" in p.what] == ["model.conversions[1]"]


def test_settings_out_of_range_are_named(tiny_base, tmp_path):
    from adapt.config import resolve
    from adapt.train.validate import problems
    from tests.recipes import tiny_recipe

    wrong = {"name": "lawcat", "chunk": 40, "conv_width": 0, "gate_rank": 0}
    over = {"objective": {"name": "next_token"}, "evaluation": {"suites": []}, "generation": {"samplers": ["ar"]}}
    found = problems(resolve(tiny_recipe(tiny_base, tmp_path, model={"conversions": [wrong]}, **over)))
    assert {p.what.partition("=")[0] for p in found} >= {"chunk", "conv_width", "gate_rank"}
