"""Learning from a teacher: layer by layer in one model, and by its next-token distributions (LAWCAT spec, section 3)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapt.components import ObjectiveChoice
from adapt.config import decode, resolve
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models
from adapt.train.validate import problems
from tests import tiny
from tests.batches import packed
from tests.models.linear import student
from tests.recipes import tiny_recipe


def run(name, batch, models, facts=None, **config):
    objective = decode({"name": name, **config}, ObjectiveChoice).build(facts or Facts())
    prepared = objective.prepare(batch, seed=0, step=0)
    return prepared, objective(models, prepared.inputs)


@pytest.fixture
def batch():
    return packed([[20, 9, 3], [30]], pad=3)


@pytest.mark.parametrize("mixer", ["gated_linear", "mamba2"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_invariant_12_teacher_forcing_is_the_teacher(family, mixer, batch):
    """Bit for bit, on packed rows: every layer hands on what the attention it replaces would."""
    teacher = attention.use(tiny.tiny_model(family))
    model = attention.use(student(mixer, family=family, dtype=torch.float32))
    rows = batch.input_ids, batch.position_ids, Layout.causal(batch.doc_ids, batch.position_ids)
    with torch.no_grad():
        expected = attention.hidden_states(teacher, *rows)
        found = attention.decode(model, *rows, transfer=torch.ones(batch.input_ids.shape))
        assert torch.equal(found.last_hidden_state, expected)
        assert not torch.equal(attention.hidden_states(model, *rows), expected)


@pytest.mark.parametrize("mixer", ["gated_linear", "mamba2"])
def test_invariant_13_each_layer_learns_by_itself(mixer, batch):
    """No gradient on the base's weights, and the loss of a layer reaches no other layer."""
    model = attention.use(student(mixer, dtype=torch.float32)).train()
    rows = batch.input_ids, batch.position_ids, Layout.causal(batch.doc_ids, batch.position_ids)
    errors = attention.decode(model, *rows, transfer=torch.ones(batch.input_ids.shape)).errors
    assert sorted(errors) == [0, 1]
    errors[1][0].backward()
    own = {n for n, p in model.named_parameters() if p.grad is not None}
    assert own == {n for n, _ in model.named_parameters() if n.startswith("model.layers.1.self_attn.recurrence.")}
    for name in own - {"model.layers.1.self_attn.recurrence.D"}:
        assert model.get_parameter(name).grad.abs().max() > 0, name


@pytest.mark.parametrize("mixer", ["gated_linear", "mamba2"])
def test_gradients_formed_on_the_way_forward_are_the_losss(mixer, batch):
    """Against the same recurrence on the same inputs, in a graph of its own; of the recurrence none is left."""
    model = attention.use(student(mixer)).train()
    mixers, calls = [layer.self_attn for layer in model.model.layers], []
    hooks = [
        m.register_forward_hook(lambda m, x, y: calls.append((m, x, y[0].detach())))
        for m in (m.recurrence for m in mixers)
    ] + [m.o_proj.register_forward_pre_hook(lambda _, x: calls.append(x[0])) for m in mixers]
    rows = batch.input_ids, batch.position_ids, Layout.causal(batch.doc_ids, batch.position_ids)
    weight = (batch.role != 0).double()
    errors = attention.decode(model, *rows, transfer=weight).errors
    assert graph(errors[0].grad_fn) == {"StackBackward0", "_SettledBackward", "torch::autograd::AccumulateGrad"}
    sum(3.0 * e[0] for e in errors.values()).backward()
    for hook in hooks:
        hook.remove()
    for i in (0, 1):
        taught, (recurrence, given, heads) = calls[2 * i : 2 * i + 2]
        found, _ = recurrence(*given)
        assert torch.equal(found, heads)
        loss = 3.0 * ((found.flatten(2) - taught).square().mean(-1) * weight).sum()
        slopes = torch.autograd.grad(loss, list(recurrence.parameters()), materialize_grads=True)
        for slope, parameter in zip(slopes, recurrence.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, slope)
    with torch.no_grad():
        assert not any(e.requires_grad for e in attention.decode(model, *rows, transfer=weight).errors.values())
    model.requires_grad_(False)
    assert not any(e.requires_grad for e in attention.decode(model, *rows, transfer=weight).errors.values())


def graph(node) -> set[str]:
    """Names of all the nodes of the backward pass that begins with this one."""
    return {node.name()}.union(*(graph(n) for n, _ in node.next_functions if n is not None))


def test_the_transfer_loss_is_the_error_of_the_heads(batch):
    """Against the heads that the projections of teacher and student are given; padding is left out."""
    teacher, model = attention.use(tiny.tiny_model().double()), attention.use(student(layers=(1,)))
    seen = {}
    hooks = [
        m.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, x, k=k: seen.update({k: x[0]}))
        for k, m in (("teacher", teacher), ("student", model))
    ]
    rows = batch.input_ids, batch.position_ids, Layout.causal(batch.doc_ids, batch.position_ids)
    with torch.no_grad():
        for m in (teacher, model):  # the first layer is the same, so the second sees the same
            attention.hidden_states(m, *rows)
        for hook in hooks:
            hook.remove()
        prepared, found = run("attention_transfer", batch, Models(model), Facts(learning=(1,)))
    real = batch.role != 0
    square = (seen["student"] - seen["teacher"]).square()[real]
    count = int(real.sum())
    assert prepared.terms["transfer"].count == prepared.terms["relative_error/01"].count == count
    assert prepared.terms["transfer"].weight == 1000
    assert prepared.terms["relative_error"].weight == 0
    torch.testing.assert_close(found["transfer"] / count, square.mean())
    relative = square.sum(-1) / seen["teacher"].square().sum(-1)[real]
    torch.testing.assert_close(found["relative_error/01"] / count, relative.mean())
    torch.testing.assert_close(found["relative_error"] / count, relative.mean())


def test_transfer_and_distillation_need_what_they_learn_from(tiny_base, tmp_path):
    over = {"evaluation": {"suites": []}, "generation": {"samplers": ["ar"]}}
    lost = tiny_recipe(tiny_base, tmp_path, objective={"name": "attention_transfer"}, **over)
    found = problems(resolve(lost))
    assert any("model.conversions makes none" in p.what for p in found)
    assert any(p.where == "trainable.include" and "*.recurrence.*" in p.what for p in found)
    alone = tiny_recipe(tiny_base, tmp_path, objective={"name": "logit_distillation"}, **over)
    assert any(p.where == "teacher" for p in problems(resolve(alone)))
    nothing = alone | {"objective": {"name": "logit_distillation", "kl": 0.0}, "teacher": {"base": "self"}}
    assert any("nothing would be distilled" in p.what for p in problems(resolve(nothing)))
    negative = alone | {"objective": {"name": "attention_transfer", "scale": 0.0}, "teacher": None}
    assert any(p.where == "objective.scale" for p in problems(resolve(negative)))


def logits(model, batch):
    rows = batch.input_ids, batch.position_ids, Layout.causal(batch.doc_ids, batch.position_ids)
    return attention.hidden_states(model, *rows) @ attention.head_weight(model).T


@pytest.fixture
def pair():
    return Models(attention.use(tiny.tiny_model(seed=1).double()), attention.use(tiny.tiny_model(seed=0).double()))


def test_distillation_is_the_mean_divergence_of_supervised_tokens(batch, pair):
    prepared, found = run("logit_distillation", batch, pair, ce=0.5)
    row, col = (batch.labels != -100).nonzero(as_tuple=True)
    with torch.no_grad():
        ours, theirs = (logits(m, batch)[row, col - 1].log_softmax(-1) for m in (pair.student, pair.teacher))
    assert prepared.terms["kl"].count == prepared.terms["ar"].count == len(row)
    torch.testing.assert_close(found["kl"], F.kl_div(ours, theirs, log_target=True, reduction="sum"))
    torch.testing.assert_close(found["ar"], F.nll_loss(ours, batch.labels[row, col], reduction="sum"))
    assert (prepared.terms["kl"].weight, prepared.terms["ar"].weight) == (1.0, 0.5)
    assert "ar" not in run("logit_distillation", batch, pair)[1]


def test_batchmean_is_pytorchs(batch, pair):
    """With the padding it counts, too, for fidelity to the runs that trained so."""
    prepared, found = run("logit_distillation", batch, pair, reduction="batchmean")
    with torch.no_grad():
        ours, theirs = (logits(m, batch).log_softmax(-1) for m in (pair.student, pair.teacher))
    expected = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    torch.testing.assert_close(found["kl"] / prepared.terms["kl"].count, expected)


def test_a_teacher_gets_no_gradient(batch, pair):
    _, found = run("logit_distillation", batch, pair)
    found["kl"].backward()
    assert all(p.grad is None for p in pair.teacher.parameters())
    assert pair.student.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("mixer", ["gated_linear", "mamba2"])
def test_transfer_with_recomputed_activations_is_the_same(mixer, batch):
    """The layer's errors leave it beside its output, and both are recomputed."""
    rows, found = (batch.input_ids, batch.position_ids, Layout.causal(batch.doc_ids, batch.position_ids)), []
    for recomputed in (False, True):
        model = attention.use(student(mixer, dtype=torch.float32)).train()
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        errors = attention.decode(model, *rows, transfer=torch.ones(batch.input_ids.shape)).errors
        sum(e[0] for e in errors.values()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())
