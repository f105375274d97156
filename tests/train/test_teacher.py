"""A frozen teacher in a run: next-token training with replay that holds on to the base's distribution."""

from __future__ import annotations

import json

import pytest
import torch

from adapt.config import resolve
from adapt.distributed import checkpoint
from adapt.errors import StopRequested, UserError
from adapt.objectives.base import Facts, Models
from adapt.objectives.next_token import NextToken
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.batches import packed
from tests.recipes import corpus, tiny_recipe
from tests.train.test_fit import launch, losses, stop_after, weights


def dap(base, folder, *, kl=0.5, replay=True, **over):
    """Domain adaptation: new text with a quarter of replay, a guard, KL to the base on the replay."""
    over = {"model": {"conversions": []}} | over
    recipe = tiny_recipe(base, folder, objective={"name": "next_token", "kl_to_base": kl}, **over)
    old = {"source": {"name": "jsonl", "path": str(corpus(folder, 40, seed=2))}, "name": "old", "weight": 0.25}
    guard = {"source": {"name": "jsonl", "path": str(corpus(folder, 12, seed=3))}, "name": "guard", "guard": True}
    recipe["data"]["train"] = [{**recipe["data"]["train"][0], "weight": 0.75}, old | {"replay": replay}]
    recipe["data"]["eval"] = [*recipe["data"]["eval"], guard]
    recipe["evaluation"] = {"suites": ["bpb"], "limit": 2} | over.get("evaluation", {})
    recipe["generation"] = {}
    return recipe | ({"teacher": {"base": "self"}} if kl else {})


def logged(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture
def dropout_base(tmp_path):
    return tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)


def test_the_kl_term_is_that_of_the_full_distributions():
    """Against dense logits in float64, over the replay rows only; gradients reach the student alone."""
    student, teacher = (tiny.tiny_model("qwen3", seed, torch.float64) for seed in (0, 1))
    from adapt.models import attention

    attention.use(student), attention.use(teacher)
    batch = packed([[13, 9, 2], [24], [5, 19], [17, 7]], pad=2)
    batch.source[:] = torch.tensor([0, 1, 0, 1])
    objective = NextToken(Facts(replay=frozenset({1})), 0.3)
    prepared = objective.prepare(batch, seed=0, step=0)
    terms = objective(Models(student, teacher), prepared.inputs)
    expected, count = 0.0, 0
    for row in (1, 3):
        for doc in batch.doc_ids[row].unique():
            where = (batch.doc_ids[row] == doc) & (batch.role[row] != 0)
            ids = batch.input_ids[row, where][None]
            if ids.shape[1] < 2:
                continue
            p, q = (m(ids, use_cache=False).logits[0, :-1].log_softmax(-1) for m in (teacher, student))
            expected, count = expected + (p.exp() * (p - q)).sum(), count + ids.shape[1] - 1
    assert prepared.terms["kl"].count == count
    assert prepared.terms["kl"].weight == 0.3
    assert terms["kl"].item() == pytest.approx(expected.item(), rel=1e-9)
    found = torch.autograd.grad(terms["kl"], list(student.parameters()), retain_graph=True)
    wanted = torch.autograd.grad(expected, list(student.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(found, wanted, strict=True))
    (terms["ar"] + terms["kl"]).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_microbatch_without_replay_asks_no_teacher_unless_it_is_sharded():
    from adapt.models import attention

    student = attention.use(tiny.tiny_model())
    objective = NextToken(Facts(replay=frozenset({1})), 1.0)
    prepared = objective.prepare(packed([[13, 9]]), seed=0, step=0)
    assert prepared.terms["kl"].count == 0
    assert objective(Models(student), prepared.inputs)["kl"].item() == 0.0
    assert objective(Models(student, student, True), prepared.inputs)["kl"].item() == 0.0
    with pytest.raises(AttributeError):  # every rank must ask: without a teacher this cannot go well
        objective(Models(student, None, True), prepared.inputs)


def test_weight_zero_is_plain_next_token_training_bit_for_bit(tiny_base, tmp_path):
    fit(resolve(dap(tiny_base, tmp_path, kl=0.0, run={"name": "zero"})))
    plain = dap(tiny_base, tmp_path, kl=0.0, replay=False, run={"name": "plain"}) | {"objective": "next_token"}
    fit(resolve(plain))
    a, b = (tmp_path / "runs" / name for name in ("zero", "plain"))
    assert losses(a) == losses(b)
    assert all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())
    assert not logged(a, "loss/kl")


@pytest.mark.parametrize("conversions", [[], [{"name": "mask_token", "token": "<|new|>"}]])
def test_the_teacher_never_changes_and_is_in_no_checkpoint(conversions, tiny_base, tmp_path, monkeypatch):
    """Also where the student has a row more than its teacher (a new mask token)."""
    from safetensors.torch import load_file

    from adapt.train import fit as module

    kept = []
    original = module.finish
    monkeypatch.setattr(module, "finish", lambda run, recipe: kept.append(run.root) or original(run, recipe))
    recipe = dap(tiny_base, tmp_path, model={"conversions": conversions})
    fit(resolve(recipe))
    (root,) = kept
    run, teacher = tmp_path / "runs" / "tiny", root.teacher.model
    base = load_file(tiny_base / "model.safetensors")
    assert all(torch.equal(base[n], p) for n, p in teacher.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher.training
    mine = {id(p) for p in teacher.parameters()}
    assert not mine & {id(p) for p in root.parameters()}
    saved = checkpoint._Reader(str(checkpoint.checkpoints(run / "checkpoints")[-1])).read_metadata().state_dict_metadata
    assert {n for n in saved if n.startswith("model/")} == {f"model/student.{n}" for n in base}
    kl = logged(run, "loss/kl")
    assert sorted(kl) == [1, 2, 3, 4, 5, 6]
    assert kl[1] < 1e-6 < kl[6]  # the student starts as its teacher
    assert all(loss == pytest.approx(logged(run, "loss/ar")[s] + 0.5 * kl[s]) for s, loss in losses(run).items())


def test_kl_holds_the_student_to_its_base(tiny_base, tmp_path):
    """The heavier the term, the smaller the divergence on guards; at step 0 it is 0."""
    found = {}
    for kl in (0.01, 10.0):
        suites = {"suites": ["bpb", "kl_to_base"], "limit": 4}
        fit(resolve(dap(tiny_base, tmp_path, kl=kl, run={"name": f"kl{kl:g}"}, evaluation=suites)))
        values = logged(tmp_path / "runs" / f"kl{kl:g}", "eval/kl_to_base/guard")
        assert values[0] == pytest.approx(0.0, abs=1e-6)
        found[kl] = values[6]
    assert 0 < found[10.0] < found[0.01]


def test_invariant_13_resume_with_teacher_and_replay_is_bit_exact(dropout_base, tmp_path, monkeypatch):
    fit(resolve(dap(dropout_base, tmp_path, run={"name": "straight"})))
    broken = dap(dropout_base, tmp_path, run={"name": "broken"})
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 3)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    a, b = (tmp_path / "runs" / name for name in ("straight", "broken"))
    for key in ("loss", "loss/kl", "eval/forgetting/guard"):
        assert logged(a, key) == logged(b, key)
    assert all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())


@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_with_a_sharded_teacher_equal_one(tied, tmp_path):
    """FSDP2 with a root for the teacher: the losses of one process, though some microbatches have no replay; suites
    ask the teacher, too."""
    base = tiny.save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    fit(resolve(constant(base, tmp_path, "one", devices=1)))
    done = launch(constant(base, tmp_path, "two", devices=2), tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    for key in ("loss", "loss/kl"):
        a, b = logged(one, key), logged(two, key)
        assert max(abs(a[s] - b[s]) for s in a) < 2e-5
    for key in ("eval/kl_to_base/guard", "eval/forgetting/guard", "eval/accuracy/guard"):
        assert logged(one, key)[4] == pytest.approx(logged(two, key)[4], abs=2e-5)


@pytest.mark.slow
def test_invariant_13_resume_on_two_ranks(tiny_base, tmp_path):
    """To 1e-6: the same two ranks, straight and stopped on the way."""
    for name, steps in (("straight", 4), ("resumed", 2)):
        recipe = constant(tiny_base, tmp_path, name, devices=2)
        recipe["trainer"]["steps"] = steps
        assert launch(recipe, tmp_path).returncode == 0
    recipe["trainer"]["steps"] = 4
    assert launch(recipe, tmp_path, "--resume").returncode == 0
    for key in ("loss", "loss/kl"):
        a, b = (logged(tmp_path / "runs" / name, key) for name in ("straight", "resumed"))
        assert sorted(a) == sorted(b) == [1, 2, 3, 4]
        assert max(abs(a[s] - b[s]) for s in a) < 1e-6


def constant(base, folder, name, *, devices):
    trainer = {"devices": devices, "steps": 4, "batch_tokens": 256, "microbatch": 1}
    suites = {"suites": ["bpb", "kl_to_base", "accuracy"], "limit": 3}
    over = {"run": {"name": name}, "schedule": {"name": "constant"}, "evaluation": suites}
    return dap(base, folder, trainer=trainer, **over)


def test_a_stage_has_a_teacher_of_its_own(tiny_base, tmp_path):
    recipe = dap(tiny_base, tmp_path, kl=0.0, trainer={"steps": 2, "batch_tokens": 256})
    second = {"objective": {"name": "next_token", "kl_to_base": 1.0}, "teacher": {"base": str(tiny_base)}}
    fit(resolve(recipe | {"stages": [{"name": "a"}, {"name": "b", **second}]}))
    assert sorted(logged(tmp_path / "runs" / "tiny", "loss/kl")) == [3, 4]


def test_a_teacher_with_other_tokens_is_refused(tiny_base, tmp_path):
    other = tiny.save_tiny(tmp_path / "other", vocab_size=300)
    tiny.tiny_tokenizer(300).save_pretrained(other)
    recipe = dap(tiny_base, tmp_path) | {"teacher": {"base": str(other)}}
    with pytest.raises(UserError, match=r"teacher\.base: the teacher has other tokens"):
        fit(resolve(recipe))


@pytest.mark.parametrize(
    "change, where",
    [
        ({"teacher": None}, "teacher"),
        ({"objective": {"name": "next_token"}}, "teacher"),
        ({"objective": {"name": "next_token", "kl_to_base": -1}}, "objective.kl_to_base"),
        ({"evaluation": {"suites": ["kl_to_base"]}, "objective": "next_token", "teacher": None}, "teacher"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(change, where, tiny_base, tmp_path):
    assert where in [p.where for p in problems(resolve(dap(tiny_base, tmp_path) | change))]


def test_replay_and_guards_have_their_places(tiny_base, tmp_path):
    recipe = dap(tiny_base, tmp_path, replay=False)
    assert [p.where for p in problems(resolve(recipe))] == ["objective.kl_to_base"]
    recipe["data"]["train"][1]["guard"] = True
    recipe["data"]["eval"][1] |= {"replay": True, "guard": False}
    recipe["evaluation"]["suites"] = ["kl_to_base"]
    found = {p.where for p in problems(resolve(recipe))}
    assert found == {"objective.kl_to_base", "data.train[1].guard", "data.eval[1].replay", "evaluation.suites[0]"}
