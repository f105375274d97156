"""Layers that learn what the teacher's do, from the teacher's own hidden states (LAWCAT spec 3, X-EcoMLA spec 4)."""

from __future__ import annotations

import copy

import pytest
import torch

from adapt.components import ObjectiveChoice
from adapt.config import decode, resolve
from adapt.conversion.base import apply_conversions
from adapt.conversion.mixers import converted_layers
from adapt.errors import UserError
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models
from adapt.objectives.layerwise import Layers
from adapt.pretrained import load_model, load_tokenizer
from adapt.train.validate import problems
from tests import tiny
from tests.batches import packed
from tests.models.linear import student as recurrent
from tests.recipes import tiny_recipe

STUDENTS = ("gated_linear", "mamba2", "latent", "stock latent", "latent and mamba2")


@pytest.fixture
def batch():
    return packed([[20, 9, 3], [30]], pad=3)


def rows(batch):
    return batch.input_ids, batch.position_ids, Layout.causal(batch.doc_ids, batch.position_ids)


def latent(base, folder, *conversions):
    over = {"objective": {"name": "next_token"}, "evaluation": {"suites": []}, "generation": {"samplers": ["ar"]}}
    made = tiny_recipe(base, folder, model={"base": str(base), "conversions": list(conversions)}, **over)
    recipe = resolve(made).recipe
    return apply_conversions(recipe, load_model(recipe), load_tokenizer(recipe))


@pytest.fixture
def made(tiny_base, tmp_path):
    """A student of each kind in float64, and its teacher."""

    def make(kind):
        plain = {"name": "xecomla", "kv_rank": 16, "calibration_tokens": 256}
        if kind == "latent":
            student = latent(tiny_base, tmp_path, plain | {"layers": [1], "latent_norm": "none"})
        elif kind == "stock latent":
            student = latent(tiny_base, tmp_path, plain)
        elif kind == "latent and mamba2":
            student = latent(tiny_base, tmp_path, {"name": "mamba2", "layers": [0]}, plain | {"layers": [1]})
        else:
            student = recurrent(kind, layers=(0, 1))
        return attention.use(student.double()), attention.use(tiny.tiny_model().double())

    return make


def run(batch, student, teacher, layers=None, **config):
    facts = Facts(converted=converted_layers(student) if layers is None else layers)
    objective = decode({"name": "layer_alignment", **config}, ObjectiveChoice).build(facts)
    prepared = objective.prepare(batch, seed=0, step=0)
    return prepared.terms, objective(Models(student, teacher), prepared.inputs)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_one_by_one_are_the_model(family, batch):
    """Bit for bit, on packed rows."""
    check_layers(attention.use(tiny.tiny_model(family)), batch)


@pytest.mark.parametrize("kind", STUDENTS)
def test_layers_one_by_one_are_the_student(kind, made, batch):
    check_layers(made(kind)[0], batch)


@torch.no_grad()
def check_layers(model, batch):
    expected = attention.hidden_states(model, *rows(batch))
    ids, positions, layout = rows(batch)
    layers = Layers(model, positions, layout, attention.make_plan(layout))
    hidden = layers.embed(ids)
    for index in range(len(layers)):
        before = hidden
        hidden, mixed = layers(index, before)
        own = model.model.layers[index]
        assert torch.equal(hidden, before + mixed + own.mlp(own.post_attention_layernorm(before + mixed)))
    assert torch.equal(model.model.norm(hidden), expected)
    assert not any(layer._forward_hooks or layer.self_attn._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("distance", ["mse", "norm"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_the_loss_is_the_error_of_each_layer_on_the_teachers_states(kind, distance, made, batch):
    """Against both models document by document, with nothing packed; padding is left out."""
    student, teacher = made(kind)
    terms, found = run(batch, student, teacher, mixer=0.5, block=2.0, distance=distance)
    layers = converted_layers(student)
    sums = {"mixer": 0.0, "block": 0.0, **dict.fromkeys(layers, 0.0)}
    for row in range(2):
        for doc in batch.doc_ids[row].unique():
            where = (batch.doc_ids[row] == doc) & (batch.role[row] != 0)
            if not bool(where.any()):
                continue
            for i, states in by_hand(student, teacher, batch.input_ids[row, where][None]).items():
                for name in ("mixer", "block"):
                    error = states[name][0] - states[name][1]
                    sums[name] += error.norm(dim=-1).sum() if distance == "norm" else error.square().mean(-1).sum()
                ours, theirs = states["mixer"]
                sums[i] += ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).sum()
    count = int((batch.role != 0).sum())
    for name, weight in (("mixer", 0.5), ("block", 2.0)):
        assert (terms[name].count, terms[name].weight) == (count * len(layers), weight)
        torch.testing.assert_close(found[name], sums[name], rtol=1e-9, atol=1e-9)
    for i in layers:
        assert (terms[f"relative_error/0{i}"].count, terms[f"relative_error/0{i}"].weight) == (count, 0.0)
        torch.testing.assert_close(found[f"relative_error/0{i}"], sums[i], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["relative_error"], sum(found[f"relative_error/0{i}"] for i in layers))
    assert found["relative_error"] > 0.01 * terms["relative_error"].count


@torch.no_grad()
def by_hand(student, teacher, ids):
    """layer -> {"mixer", "block"}: (student's, teacher's) of one document."""
    inputs = teacher.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    positions, found = torch.arange(ids.shape[1])[None], {}
    for i in converted_layers(student):
        both = []
        for model in (student, teacher):
            layer = model.model.layers[i]
            angles = model.model.rotary_emb(inputs[i], position_ids=positions)
            mixed = layer.self_attn(
                hidden_states=layer.input_layernorm(inputs[i]),
                position_embeddings=angles,
                attention_mask=None,
                position_ids=positions,
            )[0]
            both.append((mixed, inputs[i] + mixed + layer.mlp(layer.post_attention_layernorm(inputs[i] + mixed))))
        found[i] = {name: tuple(side[k] for side in both) for k, name in enumerate(("mixer", "block"))}
    return found


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("term", ["mixer", "block"])
def test_no_gradient_crosses_layers(term, kind, made, batch):
    """Layer 1 learns from its own error alone: its mixer, and its MLP only where the block's output counts. The teacher,
    embedding, head and the layers before get nothing."""
    student, teacher = made(kind)
    _, found = run(batch, student.train(), teacher, layers=(1,), **{"mixer": 0.0, term: 1.0})
    found[term].backward()
    reached = {n for n, p in student.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    assert all(n.startswith("model.layers.1.") for n in reached)
    assert any(".self_attn.o_proj." in n for n in reached)
    assert any(".mlp." in n for n in reached) == (term == "block")
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind", STUDENTS)
def test_recomputed_activations_give_the_same_gradients(kind, made, batch):
    found = []
    for recomputed in (False, True):
        student, teacher = made(kind)
        student.train()
        if recomputed:
            student.activation_checkpointing_enable({"use_reentrant": False})
        _, terms = run(batch, student, teacher, block=1.0)
        (terms["mixer"] + terms["block"]).backward()
        found.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())


def test_inputs_of_sharded_layers_change_no_gradient(made, batch):
    """They have one for FSDP2's sake, and it is thrown away."""
    found = []
    for sharded in (False, True):
        student, teacher = made("mamba2")
        objective = decode({"name": "layer_alignment"}, ObjectiveChoice).build(Facts(converted=(0, 1)))
        terms = objective(Models(student, teacher, sharded), objective.prepare(batch, seed=0, step=0).inputs)
        terms["mixer"].backward()
        found.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())


@pytest.mark.parametrize("distance", ["mse", "norm"])
def test_a_layer_that_is_the_teachers_has_no_error_and_no_gradient(distance, batch):
    """A distance of 0 has a direction no more than a gradient: not NaN."""
    teacher = attention.use(tiny.tiny_model())
    student = copy.deepcopy(teacher)
    _, found = run(batch, student, teacher, layers=(0, 1), block=1.0, distance=distance)
    assert all(float(value.detach()) == 0.0 for value in found.values())
    (found["mixer"] + found["block"]).backward()
    assert all(bool((p.grad == 0).all()) for p in student.parameters() if p.grad is not None)


def test_a_teacher_of_another_shape_is_refused(batch):
    student = attention.use(recurrent(dtype=torch.float32))
    with pytest.raises(UserError, match=r"teacher\.base: it has 3 layers of size 32, the student 2 of 32"):
        run(batch, student, attention.use(tiny.tiny_model(num_hidden_layers=3)))


def test_what_cannot_be_aligned_is_refused_by_name(tiny_base, tmp_path):
    over = {"evaluation": {"suites": []}, "generation": {"samplers": ["ar"]}}
    wrong = {"name": "layer_alignment", "mixer": 0.0}
    recipe = tiny_recipe(tiny_base, tmp_path, objective=wrong, **over, trainer={"compile": True})
    found = {p.where: p.what for p in problems(resolve(recipe))}
    assert "['*.self_attn.*']" in found["trainable.include"]
    assert "cannot be looked into" in found["trainer.compile"]
    assert "needs a teacher" in found["teacher"]
    negative = recipe | {"objective": {"name": "layer_alignment", "block": -1.0}}
    assert "objective.block" in {p.where for p in problems(resolve(negative))}
    said = [p.what for p in problems(resolve(recipe)) if p.where == "objective"]
    assert any("mixer and block are both 0" in what for what in said)
    assert any("model.conversions makes none" in what for what in said)
