"""Passkey scoring with a perfect, a blind and a real decoder."""

from __future__ import annotations

import json
import re

import pytest
import torch

from adapt.config import decode
from adapt.config.schema import Evaluation
from adapt.data.questions import Asker, Question
from adapt.errors import UserError
from adapt.evaluate.answers import answer_nats, first_fit, greedy, groups
from adapt.generation.contract import Contract
from adapt.train.rules import core_problems
from tests import tiny
from tests.evaluate import oracle
from tests.evaluate.test_suites import context, suite
from tests.evaluate.test_verb import place, run  # noqa: F401

SMALL = {"lengths": (260, 300), "depths": 4, "trials": 1}


def test_a_decoder_that_reads_scores_one_everywhere(monkeypatch):
    seen = oracle.install(monkeypatch, lambda text: re.search(r"The pass key is (\d+)\.", text)[1])
    grids = []
    results = suite("passkey", **SMALL)(context(None, keep=grids.append))
    assert results["passkey/260"] == results["passkey/300"] == results["passkey"] == 1
    assert grids[0].cells == ((1.0,) * 4,) * 2
    assert len(seen) == 8


def test_only_the_exact_key_counts(monkeypatch):
    oracle.install(monkeypatch, lambda text: re.search(r"The pass key is (\d+)\.", text)[1][:-1] + "x")
    assert suite("passkey", **SMALL)(context(None))["passkey"] == 0


def test_a_cell_is_the_mean_of_its_own_trials(monkeypatch):
    def only_early(text: str) -> str:
        found = re.search(r"The pass key is (\d+)\.", text)
        return found[1] if found.start() < len(text) / 2 else "no"

    oracle.install(monkeypatch, only_early)
    grids = []
    results = suite("passkey", lengths=(500,), depths=2, trials=3)(context(None, keep=grids.append))
    assert grids[0].cells[0][0] > grids[0].cells[0][1]
    assert results["passkey"] == pytest.approx(sum(grids[0].cells[0]) / 2)


def test_metrics_are_those_announced():
    made = suite("passkey", **SMALL)
    results = made(context(None))
    assert list(results) == made.config.metrics(None, [])
    assert results == suite("passkey", **SMALL)(context(None))


def test_likelihood_of_packed_answers_is_that_of_each_alone():
    questions = [Question([5, 6, 7][:n], [9, 10 + n, 4][: 1 + n % 3]) for n in (1, 2, 3)] + [Question([8] * 30, [11])]
    found = answer_nats(context(None), questions)
    model = tiny.tiny_model("qwen3", dtype=torch.float64)
    for question, nats in zip(questions, found, strict=True):
        ids = question.prompt + question.answer
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = -sum(float(logp[i - 1, ids[i]]) for i in range(len(question.prompt), len(ids)))
        assert nats == pytest.approx(own, rel=1e-9)


def test_greedy_decodes_each_as_it_would_alone():
    prompts = [[5, 6, 7, 8], [9], [10, 11] * 9]
    wanted = [3, 5, 2]
    together = greedy(context(None), prompts, wanted)
    model = tiny.tiny_model("qwen3", dtype=torch.float64)
    for prompt, count, found in zip(prompts, wanted, together, strict=True):
        ids = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found == ids[len(prompt) :]


def test_a_prompt_beyond_the_context_is_refused():
    with pytest.raises(UserError, match="context of 512"):
        greedy(context(None), [[5] * 510], [5])


@pytest.mark.parametrize("lengths", ([5, 3, 9, 2, 2], [1], list(range(1, 40))))
def test_every_sequence_is_in_one_row_and_rows_hold(lengths):
    for rows in (first_fit(lengths, 41), groups(lengths)):
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 41 for row in first_fit(lengths, 41))


def test_questions_are_tokenised_as_training_rows(tokenizer):
    asker = Asker(tokenizer)
    question = asker("Where?", "Here")
    given = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where?"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(question.prompt) == given
    assert tokenizer.decode(question.answer) == "Here"


def test_a_context_that_is_not_causal_is_refused():
    with pytest.raises(UserError, match="context_mask: block"):
        suite("passkey")(context(None, contract=Contract(block_size=4, context_mask="block")))


@pytest.mark.parametrize("fields", ({"lengths": ()}, {"lengths": (5, 5)}, {"depths": 0}, {"trials": 0}))
def test_bad_settings(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        suite("passkey", **fields)


def test_a_model_without_recipe_or_data_is_measured(place, capsys, monkeypatch):  # noqa: F811
    from adapt.evaluate.suites.passkey import PasskeyConfig

    monkeypatch.setattr(PasskeyConfig.__init__, "__kwdefaults__", {**PasskeyConfig.__init__.__kwdefaults__, **SMALL})
    assert run(place / "model", "--suite", "passkey", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["passkey/300"] in (0, 0.25, 0.5, 0.75, 1)
    (grid,) = results["grids"]
    assert grid["rows"] == ["260", "300"]
    assert run(place / "model", "--suite", "passkey") == 0
    assert "passkey, % right" in capsys.readouterr().out


def test_only_suites_that_need_held_out_data_ask_for_it(place):  # noqa: F811
    from dataclasses import replace

    from adapt.config import load

    recipe = load(str(place / "recipe.yaml")).recipe
    bare = replace(recipe, data=replace(recipe.data, eval=()))
    evaluation = {name: decode({"suites": [name]}, Evaluation) for name in ("passkey", "bpb")}
    found = {name: [p.where for p in core_problems(replace(bare, evaluation=e), 0)] for name, e in evaluation.items()}
    assert found == {"passkey": [], "bpb": ["data.eval"]}


def test_plain_prompts_are_text_to_go_on_with(monkeypatch, tokenizer):
    seen = oracle.install(monkeypatch, lambda text: " " + re.search(r"The pass key is (\d+)\.", text)[1])
    assert suite("passkey", prompt="plain", **SMALL)(context(None))["passkey"] == 1
    assert all(tokenizer.decode(prompt).endswith("The pass key is") for prompt in seen)
    assert suite("passkey", **SMALL)(context(None))["passkey"] == 0  # a turn does not begin with a space
