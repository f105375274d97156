"""DPO: its loss and gradient against full logits, its start, and what it refuses (X-EcoMLA spec, section 4 and 9)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from adapt.components import ObjectiveChoice
from adapt.config import decode, resolve
from adapt.data.batch import CONTEXT, Batch
from adapt.models import attention
from adapt.objectives.base import Facts, Models
from adapt.objectives.dpo import WATCHED
from adapt.train.validate import problems
from tests import tiny
from tests.batches import packed
from tests.recipes import tiny_recipe

PROMPT = 6


def pairs_of(lengths: list[tuple[int, int]], **over) -> Batch:
    """Two rows per pair, with the same prompt of 6 tokens in both."""
    batch = packed([[n] for pair in lengths for n in pair], prompt=PROMPT, **over)
    batch.input_ids[1::2, :PROMPT] = batch.input_ids[::2, :PROMPT]
    assert (batch.role[:, :PROMPT] == CONTEXT).all()
    return replace(batch, pair_index=torch.arange(len(lengths)).repeat_interleave(2))


def build(**config):
    return decode({"name": "dpo", **config}, ObjectiveChoice).build(Facts())


def remembered(objective, student, batch):
    """The objective, told what `student` makes of the batch."""
    objective.remember(lambda b: torch.zeros(b.num_rows, dtype=torch.float64))
    with torch.no_grad():
        values = objective.row_values(Models(student), objective.prepare(batch, seed=0, step=0).inputs).double()
    of = dict(zip(batch.sample_index.tolist(), values.tolist(), strict=True))
    objective.remember(lambda b: torch.tensor([of[i] for i in b.sample_index.tolist()], dtype=torch.float64))
    return objective


def full_log_probabilities(model, batch):
    """[B] by a plain forward with all logits, each row alone and without its padding."""
    found = []
    for row in range(batch.num_rows):
        real = batch.role[row] != 0
        ids, labels = batch.input_ids[row, real], batch.labels[row, real]
        logits = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        scored = labels[1:] != -100
        found.append(logits[scored].gather(1, labels[1:][scored][:, None]).sum())
    return torch.stack(found)


@pytest.fixture
def batch():
    return pairs_of([(20, 31), (40, 15), (12, 12)], pad=3)


@pytest.fixture
def models():
    """Student and reference, in float64."""
    return tuple(attention.use(tiny.tiny_model(seed=s, dtype=torch.float64)) for s in (0, 1))


@pytest.mark.parametrize("nll, smoothing", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("reference", ["start", "teacher"])
def test_loss_and_gradient_are_those_of_the_full_logits(reference, nll, smoothing, batch, models):
    """Against autograd through plain forwards in float64; nothing flows into the reference."""
    student, other = models
    objective = build(beta=0.2, nll=nll, label_smoothing=smoothing, reference=reference)
    if reference == "start":
        remembered(objective, other, batch)
    prepared = objective.prepare(batch, seed=0, step=0)
    terms = objective(Models(student, other if reference == "teacher" else None), prepared.inputs)
    ours, theirs = full_log_probabilities(student, batch), full_log_probabilities(other.requires_grad_(False), batch)
    h = 0.2 * ((ours - theirs)[::2] - (ours - theirs)[1::2])
    expected = (-(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)).sum()
    torch.testing.assert_close(terms["dpo"], expected, rtol=1e-10, atol=0)
    assert prepared.terms["dpo"].count == 3
    loss, wanted = terms["dpo"] / 3, expected / 3
    if nll:
        count = int((batch.labels[::2] != -100).sum())
        torch.testing.assert_close(terms["nll"], -ours[::2].sum(), rtol=1e-10, atol=0)
        assert (prepared.terms["nll"].count, prepared.terms["nll"].weight) == (count, nll)
        loss, wanted = loss + nll * terms["nll"] / count, wanted - nll * ours[::2].sum() / count
    assert "nll" not in terms or nll
    found = torch.autograd.grad(loss, list(student.parameters()))
    slow = torch.autograd.grad(wanted, list(student.parameters()))
    for a, b in zip(found, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    assert all(p.grad is None for p in other.parameters())


def test_what_is_watched_is_of_no_weight(batch, models):
    """Accuracy, margin and rewards are logged: means over pairs, without gradient and not in the loss."""
    student, other = models
    objective = remembered(build(beta=0.5), other, batch)
    prepared = objective.prepare(batch, seed=0, step=0)
    terms = objective(Models(student), prepared.inputs)
    moved = 0.5 * (full_log_probabilities(student, batch) - full_log_probabilities(other, batch)).detach()
    h = moved[::2] - moved[1::2]
    for name, value in zip(WATCHED, ((h > 0).double(), h, moved[::2], moved[1::2]), strict=True):
        assert (prepared.terms[name].weight, prepared.terms[name].count) == (0.0, 3)
        assert not terms[name].requires_grad
        torch.testing.assert_close(terms[name], value.sum())


@pytest.mark.parametrize("beta", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_invariant_14_the_loss_at_the_start_is_ln_2(family, beta, batch):
    """The reference is the student itself: in float32, exactly as long as the microbatch is the same."""
    student = attention.use(tiny.tiny_model(family))
    objective = remembered(build(beta=beta), student, batch)
    found = objective(Models(student), objective.prepare(batch, seed=0, step=0).inputs)
    assert found["dpo"].item() / 3 == pytest.approx(math.log(2), rel=1e-7)
    assert found["margin"].item() == 0.0


def test_invariant_13_a_teacher_gets_no_gradient(batch, models):
    student, teacher = models
    objective = build(reference="teacher")
    found = objective(Models(student, teacher), objective.prepare(batch, seed=0, step=0).inputs)
    found["dpo"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad.abs().max() > 0 for p in student.parameters())


def test_one_microbatch_or_many(batch, models):
    """Sums over pairs, however they are cut; short microbatches are computed with shorter rows."""
    student, other = models
    batch = pairs_of([(20, 31), (400, 150), (12, 12)])
    objective = remembered(build(nll=0.2), other, batch)
    whole = objective.prepare(batch, seed=0, step=0)
    cut = [objective.prepare(batch.rows(i, i + 2), seed=0, step=0) for i in (0, 2, 4)]
    assert [p.inputs["input_ids"].shape[1] for p in cut] == [128, 400, 128]
    together = objective(Models(student), whole.inputs)
    apart = [objective(Models(student), p.inputs) for p in cut]
    for name, value in together.items():
        torch.testing.assert_close(sum(found[name] for found in apart), value, rtol=1e-9, atol=1e-9)
        assert sum(p.terms[name].count for p in cut) == whole.terms[name].count


def test_the_dry_run_sees_whole_rows():
    """The rows of the first step may be short; memory is needed for the longest."""
    batch = pairs_of([(20, 31)], pad=400)
    objective = build(reference="teacher")
    assert objective.prepare(batch, seed=0, step=0).inputs["input_ids"].shape == (2, 128)
    assert objective.prepare(batch, seed=0, step=objective.largest_step()).inputs["input_ids"].shape == (2, 431)


def test_pairs_are_never_parted(batch):
    objective = build(reference="teacher")
    for parted in (batch.rows(1, 3), batch.rows(0, 1)):
        with pytest.raises(ValueError, match="must stand together"):
            objective.prepare(parted, seed=0, step=0)


def test_a_reference_that_was_not_taken_is_not_made_up(batch):
    with pytest.raises(RuntimeError, match="what the student was at the start"):
        build().prepare(batch, seed=0, step=0)


@pytest.mark.parametrize(
    "over, where",
    [
        ({"objective": {"name": "dpo", "beta": 0.0}}, "objective.beta"),
        ({"objective": {"name": "dpo", "label_smoothing": 0.5}}, "objective.label_smoothing"),
        ({"objective": {"name": "dpo", "nll": -1.0}}, "objective.nll"),
        ({"objective": {"name": "dpo", "reference": "teacher"}}, "teacher"),
        ({"trainer": {"microbatch": 3}}, "trainer.microbatch"),
        ({"trainer": {"batch_tokens": 192}}, "trainer.batch_tokens"),
        ({"data": {"packing": "best_fit"}}, "data.packing"),
    ],
)
def test_what_makes_no_sense_is_named(over, where, tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, **({"objective": "dpo"} | over))
    recipe |= {"generation": {}, "evaluation": {}}
    assert where in {p.where for p in problems(resolve(recipe))}
