"""The suites against brute force with dense masks, one document and one token at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from adapt.components import suites
from adapt.errors import UserError
from adapt.evaluate.context import EvalContext
from adapt.evaluate.runner import evaluate, results_table
from adapt.generation.contract import Contract
from adapt.models import attention
from adapt.objectives.base import Facts
from adapt.train.root import Root
from tests import tiny
from tests.batches import packed
from tests.generation.reference import MASK, decode, logits_of

SETS = {
    "one": lambda: iter([packed([[13, 9, 2], [24]], pad=3), packed([[5, 19]], seed=1, index=2)]),
    "two": lambda: iter([packed([[30]], seed=2, prompt=6)]),
}


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model("qwen3", dtype=torch.float64)


def context(model, **over) -> EvalContext:
    root = Root(attention.use(tiny.tiny_model("qwen3", dtype=torch.float64))).eval()

    def call(fn, *args):
        with torch.no_grad():
            return root(fn, *args)

    return EvalContext(
        **{
            "call": call,
            "tokenizer": tiny.tiny_tokenizer(),
            "eval_sets": SETS,
            "facts": Facts(mask_token_id=MASK),
            "contract": Contract(block_size=4),
            **over,
        }
    )


def suite(name, **fields):
    entry = suites[name]
    return entry.factory(entry.config_type(**fields))


def documents(label):
    """(ids, whether each token is scored) of every document."""
    for batch in SETS[label]():
        for row in range(batch.num_rows):
            for doc in batch.doc_ids[row].unique():
                where = batch.doc_ids[row] == doc
                yield batch.input_ids[row, where].tolist(), (batch.labels[row, where] != -100).tolist()


def test_bpb(model):
    results = suite("bpb")(context(model))
    decoded = tiny.tiny_tokenizer().backend_tokenizer
    for label in SETS:
        nats, num_bytes, count = 0.0, 0, 0
        for ids, scored in documents(label):
            with torch.no_grad():
                logp = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            for i in (i for i, s in enumerate(scored) if s):
                nats, count = nats - float(logp[i - 1, ids[i]]), count + 1
                num_bytes += len(decoded.id_to_token(ids[i]))
        assert results[f"bpb/{label}"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-10)
        assert results[f"ar_loss/{label}"] == pytest.approx(nats / count, rel=1e-10)
    assert set(results) == {f"{m}/{d}" for m in ("bpb", "ar_loss") for d in SETS}


def test_masked_ce_with_everything_hidden(model):
    """t = 1: each block of each document with all but its first token hidden, after its clean predecessors."""
    results = suite("masked_ce", t=(1.0,), block_size=4)(context(model, contract=Contract()))
    for label in SETS:
        nats, count = 0.0, 0
        for ids, scored in documents(label):
            given = next((i for i, s in enumerate(scored) if s), 0)
            answer = given if given > 1 else 0  # blocks begin where decoding would
            for start in range(answer, len(ids), 4):
                truth = ids[start : start + 4]
                hidden = [i for i in range(1, len(truth)) if scored[start + i]]
                if not hidden:
                    continue
                block = [MASK if i in hidden else t for i, t in enumerate(truth)]
                logp = logits_of(model, ids[:start], block)[start:].log_softmax(-1)
                nats -= sum(float(logp[i - 1, truth[i]]) for i in hidden)
                count += len(hidden)
        assert results[f"masked_ce/{label}/b4/t1"] == pytest.approx(nats / count, rel=1e-10)
        assert results[f"masked_ce/{label}/b4"] == results[f"masked_ce/{label}/b4/t1"]


def test_masked_ce_is_the_mean_over_t_and_repeats(model):
    one, two = (suite("masked_ce")(context(model)) for _ in range(2))
    assert one == two
    for label in SETS:
        parts = [one[f"masked_ce/{label}/b4/t{t}"] for t in ("0.25", "0.5", "0.75", "1")]
        assert one[f"masked_ce/{label}/b4"] == pytest.approx(sum(parts) / 4)
    other = suite("masked_ce")(context(model, seed=1))
    assert other["masked_ce/one/b4/t0.5"] != one["masked_ce/one/b4/t0.5"]
    assert other["masked_ce/one/b4/t1"] == one["masked_ce/one/b4/t1"]


def test_tokens_per_forward(model):
    results = suite("tokens_per_forward", thresholds=(0.9, 0.05), num_prompts=3, prompt_tokens=10, new_tokens=11)(
        context(model)
    )
    prompts = [docs[:10] for docs in prompts_by_hand()]
    for tau in (0.9, 0.05):
        forwards = sum(decode(model, p, 11, b=4, tau=tau)[1] for p in prompts)
        assert results[f"tokens_per_forward/tau{tau:g}"] == 33 / forwards


def prompts_by_hand():
    """Documents of ten tokens or more, the two datasets in turn."""
    one, two = ([ids for ids, _ in documents(d)] for d in SETS)
    return [one[0], two[0], next(d for d in one[1:] if len(d) >= 10)]


def test_tokens_per_forward_uses_short_documents_where_it_must(model):
    results = suite("tokens_per_forward", num_prompts=50, prompt_tokens=25, new_tokens=3)(context(model))
    assert results["tokens_per_forward/tau0.9"] > 0


def test_ranks_add_up(model):
    """Sums and counts are reduced, never means: two ranks with unequal shares give the single process's result."""
    names = ("bpb", "masked_ce")
    whole = {n: suite(n)(context(model)) for n in names}
    batches = {label: list(make()) for label, make in SETS.items()}
    shares = [
        {label: (lambda rows=rows: iter(rows[:1])) for label, rows in batches.items()},
        {label: (lambda rows=rows: iter(rows[1:])) for label, rows in batches.items()},
    ]
    for name in names:
        seen = []

        def first(sums, seen=seen):
            seen.append(sums)
            return sums

        suite(name)(context(model, eval_sets=shares[0], reduce=first))
        partial = iter(seen)

        def second(sums, partial=partial):
            other = next(partial)
            return {k: v + other[k] for k, v in sums.items()}

        together = suite(name)(context(model, eval_sets=shares[1], reduce=second))
        assert together == pytest.approx(whole[name], rel=1e-12)


@pytest.mark.parametrize("name", ("masked_ce", "tokens_per_forward"))
def test_what_a_suite_needs_and_lacks(model, name):
    with pytest.raises(UserError, match="block size"):
        suite(name)(context(model, contract=Contract()))
    with pytest.raises(UserError, match="mask token"):
        suite(name)(context(model, facts=Facts()))


@pytest.mark.parametrize(
    ("name", "fields"),
    (
        ("masked_ce", {"block_size": 1}),
        ("masked_ce", {"t": (0.0,)}),
        ("masked_ce", {"t": ()}),
        ("tokens_per_forward", {"thresholds": (1.5,)}),
        ("tokens_per_forward", {"num_prompts": 0}),
    ),
)
def test_bad_settings(name, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        suite(name, **fields)


def test_runner_and_table(model):
    from rich.console import Console

    from adapt.components import SuiteChoice
    from adapt.config import decode as read

    choices = [read(c, SuiteChoice) for c in ("bpb", {"name": "masked_ce", "t": [0.5]})]
    results = evaluate(choices, context(model))
    assert next(iter(results)) == "bpb/one"
    console = Console(width=100, record=True)
    console.print(results_table(results, {k: v * 0.5 for k, v in results.items()}))
    console.print(results_table({}, results))
    text = console.export_text()
    assert "-50.0 %" in text
    assert "masked_ce/two/b4/t0.5" in text


def test_accuracy(model):
    results = suite("accuracy")(context(model))
    for label in SETS:
        right, count = 0, 0
        for ids, scored in documents(label):
            with torch.no_grad():
                guesses = model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1)
            right += sum(int(guesses[i - 1]) == ids[i] for i, s in enumerate(scored) if s)
            count += sum(scored)
        assert results[f"accuracy/{label}"] == pytest.approx(right / count)


def test_kl_to_base_on_guards(model):
    from adapt.train.root import Frozen, look

    other = attention.use(tiny.tiny_model("qwen3", 1, torch.float64))
    root = Root(attention.use(tiny.tiny_model("qwen3", dtype=torch.float64)), Frozen(other)).eval()
    results = suite("kl_to_base")(context(model, call=lambda *a: look(root, *a), guards=("two",)))
    assert set(results) == {"kl_to_base/two"}
    total, count = 0.0, 0
    for ids, scored in documents("two"):
        with torch.no_grad():
            p, q = (m(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1) for m in (other, model))
        for i in (i for i, s in enumerate(scored) if s):
            total, count = total + float((p[i - 1].exp() * (p[i - 1] - q[i - 1])).sum()), count + 1
    assert results["kl_to_base/two"] == pytest.approx(total / count, rel=1e-9)


def test_kl_to_base_says_what_it_lacks(model):
    with pytest.raises(UserError, match="guard: true"):
        suite("kl_to_base")(context(model))
    with pytest.raises(UserError, match="needs a teacher"):
        suite("kl_to_base")(context(model, guards=("two",)))


def test_forgetting_is_bits_per_byte_above_the_start(model):
    """Exactly 0 at the start; measured for guards only, and only where the start is known."""
    at_start = suite("bpb")(context(model, guards=("one", "two"), start={}))
    assert at_start["forgetting/one"] == at_start["forgetting/two"] == at_start["forgetting/worst"] == 0.0
    start = {"bpb/one": 1.0, "bpb/two": 0.5}
    later = suite("bpb")(context(model, guards=("one", "two"), start=start))
    risen = {label: later[f"bpb/{label}"] - start[f"bpb/{label}"] for label in SETS}
    assert {label: later[f"forgetting/{label}"] for label in SETS} == risen
    assert later["forgetting/worst"] == max(risen.values())
    assert not [m for m in suite("bpb")(context(model, guards=("one",))) if m.startswith("forgetting")]
    assert not [m for m in suite("bpb")(context(model, start={})) if m.startswith("forgetting")]


def test_an_evaluation_that_takes_long_says_what_it_is_at(model, monkeypatch):
    from adapt.components import SuiteChoice
    from adapt.config import decode as read
    from adapt.evaluate import runner

    choices, said = [read(name, SuiteChoice) for name in ("bpb", "accuracy")], []
    evaluate(choices, context(model, say=said.append))
    assert said == []
    monkeypatch.setattr(runner, "LONG", -1.0)
    evaluate(choices, context(model, say=said.append))
    assert said == ["evaluating: bpb (1 of 2)", "evaluating: accuracy (2 of 2)"]
