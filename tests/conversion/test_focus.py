"""The initialiser `focus`: sparse mixes of old tokens that occur where the new ones do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from adapt.components import InitialiserChoice, SourceChoice
from adapt.config import decode, resolve
from adapt.conversion.base import apply_conversions
from adapt.conversion.initialisers import focus as module
from adapt.conversion.initialisers.base import Table
from adapt.conversion.initialisers.focus import Focus, FocusConfig, sparsemax
from adapt.conversion.texts import Extension, Text
from adapt.errors import UserError
from adapt.pretrained import load_model, load_tokenizer
from adapt.train.validate import check
from tests import tiny
from tests.conversion.extended import TEXT
from tests.conversion.said import Said, chatter
from tests.train.test_vocabulary_run import extending

OLD, TWIN, NEW, RARE = 30, 17, 30, 31
"""30 old ids; new token 30 is used like old token 17, and 31 hardly at all."""


def synonymous() -> list[np.ndarray]:
    """Each old token has company of its own (those of near ids); half of the time that 17 occurs, 30 stands there."""
    rng = np.random.default_rng(1)
    documents = []
    for _ in range(600):
        centre = rng.integers(3, OLD)
        document = (centre + rng.integers(-2, 3, 12) - 3) % (OLD - 3) + 3
        document[(document == TWIN) & (rng.random(12) < 0.5)] = NEW
        documents.append(document)
    documents[0][:2] = RARE
    return documents


def table(side="input", documents=None, seed=0, ids=(NEW, RARE), d=6) -> Table:
    torch.manual_seed(2)
    trained = torch.ones(OLD, dtype=torch.bool)
    trained[:3] = False
    extension = Said(ids, synonymous() if documents is None else documents)
    return Table(torch.randn(OLD, d), trained, [(4, 5)] * len(ids), side, seed, extension)


def start(given: Table, **config) -> torch.Tensor:
    return decode({"name": "focus", **config}, InitialiserChoice).build()(given)


# sparsemax


def simplex_projection(row: np.ndarray) -> np.ndarray:
    """By bisection on the threshold: another way than the sorted one."""
    low, high = row.min() - 1, row.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(row - low, 0)


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 90)), elements=st.floats(-1, 1, width=32)))
def test_sparsemax_is_the_projection_onto_the_simplex(scores):
    found = sparsemax(torch.from_numpy(scores)).numpy()
    np.testing.assert_allclose(found, np.stack([simplex_projection(row) for row in scores]), atol=1e-9)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-9)


def test_sparsemax_of_a_support_larger_than_the_first_look():
    scores = torch.full((2, 700), 0.25, dtype=torch.float64)
    scores[1, 0] = 0.251
    found = sparsemax(scores)
    torch.testing.assert_close(found[0], torch.full((700,), 1 / 700, dtype=torch.float64))
    assert (found[1] > 0).all()
    assert found.sum(1).tolist() == pytest.approx([1, 1])


# rows


def heaviest(given: Table, **config) -> dict[int, int]:
    """Old id with the largest weight, of each new token that has a vector."""
    found = Focus(FocusConfig(**config)).neighbours(given)
    ends = [*found.offsets.tolist()[1:], len(found.old)]
    return {
        int(token): int(found.old[begin + int(found.weights[begin:end].argmax())])
        for token, begin, end in zip(found.tokens, found.offsets.tolist(), ends, strict=True)
    }


def test_a_synonym_is_the_heaviest_neighbour():
    assert heaviest(table(), dim=20) == {0: TWIN}


def test_rows_are_the_mix_that_the_weights_say():
    given = table()
    found = Focus(FocusConfig(dim=20)).neighbours(given)
    assert found.tokens.tolist() == [0]
    assert found.weights.sum() == pytest.approx(1)
    assert (found.weights > 0).all()
    expected = (found.weights[:, None].float() * given.rows[found.old]).sum(0)
    torch.testing.assert_close(start(given, dim=20)[0], expected)


def test_only_trained_and_frequent_old_tokens_are_neighbours():
    given = table(documents=[*synonymous(), *chatter([0, 1, 2, NEW], 2000), np.array([29] * 5)])
    used = set(Focus(FocusConfig(dim=20)).neighbours(given).old.tolist())
    assert used
    assert min(used) >= 3
    without = table(documents=[d[d != TWIN] for d in synonymous()])
    assert TWIN not in Focus(FocusConfig(dim=20)).neighbours(without).old.tolist()


def test_a_token_without_a_vector_is_drawn_like_a_trained_row():
    """N(mu, diag sigma^2) over the trained rows, another for each token, side and seed."""
    ids = range(NEW, NEW + 20_000)
    found, given = start(table(ids=ids), dim=20), table(ids=ids)
    rows, drawn = given.rows[3:], found[1:]
    assert ((drawn.mean(0) - rows.mean(0)) / rows.std(0)).abs().max() < 0.05
    torch.testing.assert_close(drawn.std(0), rows.std(0, correction=0), rtol=0.02, atol=0)
    assert (torch.corrcoef(drawn.T) - torch.eye(6)).abs().max() < 0.05
    for other in (table("output", ids=ids), table(seed=1, ids=ids)):
        assert not torch.equal(drawn, start(other, dim=20)[1:])


def test_both_sides_have_the_same_weights_and_the_texts_are_read_once():
    given = table()
    head = Table(given.rows.flip(0), given.trained, given.pieces, "output", 0, given.extension)
    made = Focus(FocusConfig(dim=20))
    made(given)
    found = made(head)
    assert given.extension.read == 1
    mix = made.neighbours(given)
    torch.testing.assert_close(found[0], (mix.weights[:, None].float() * head.rows[mix.old]).sum(0))
    made(table())
    assert made._found[0] is not given.extension  # another extension is read anew


def test_the_same_rows_every_time_whatever_is_in_memory_at_once(monkeypatch):
    ids = range(NEW, NEW + 6)
    given = table(ids=ids, documents=chatter(range(36), 8000))
    first = start(given)
    assert torch.equal(first, start(table(ids=ids, documents=chatter(range(36), 8000))))
    monkeypatch.setattr(module, "ROWS", 2)
    monkeypatch.setattr(module, "FIRST", 1)
    torch.testing.assert_close(start(given), first, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("documents", "config", "where", "says"),
    [
        ([], {}, "texts", "there is no text in them"),
        (
            None,
            {"min_count": 1000},
            "min_count",
            r"1000: no new token occurs so often in the 7,200 tokens of text; the",
        ),
        ([np.array([NEW] * 50)], {}, "min_count", "10: no old token occurs so often in the 50 tokens of text"),
        ([np.array([i]) for i in [NEW, 5] * 20], {}, "texts", "no token of the texts has neighbours of its own"),
    ],
)
def test_texts_that_teach_nothing_are_refused(documents, config, where, says):
    with pytest.raises(UserError, match=says) as error:
        start(table(documents=documents), **config)
    assert [p.where for p in error.value.problems] == [where]


# in a recipe


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    return tiny.save_tiny(tmp_path / "base", tie_word_embeddings=request.param)


def focused(base, folder, init=None, **over):
    conversion = {"name": "vocabulary", "init": {"name": "focus", "dim": 8, **(init or {})}}
    return extending(base, folder, model={"conversions": [conversion]}, **over)


def converted(raw):
    made = resolve(raw).stages[0]
    model, tokenizer = load_model(made), load_tokenizer(made)
    old = [p.detach().clone() for p in _tables(model)]
    apply_conversions(made, model, tokenizer)
    return old, model


def _tables(model):
    found = [model.get_input_embeddings().weight]
    return found if model.config.tie_word_embeddings else [*found, model.get_output_embeddings().weight]


@torch.no_grad()
def test_invariant_10_old_rows_and_logits_stay_and_new_rows_are_mixes(base, tmp_path):
    old, model = converted(focused(base, tmp_path))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (len(old) == 1)
    made = resolve(focused(base, tmp_path)).stages[0]
    for before, after in zip(old, _tables(model), strict=True):
        assert after.shape == (360, 32)
        assert torch.equal(after[:320], before)
        assert torch.isfinite(after).all()
        trained = torch.arange(320) >= 4
        given = Table(before, trained, [()] * 40, "input", made.run.seed, Extension(made, range(320, 360)))
        found = Focus(FocusConfig(dim=8)).neighbours(given)
        assert 10 < len(found.tokens) < 40
        mixes = torch.nn.functional.embedding_bag(
            found.old, before, found.offsets, mode="sum", per_sample_weights=found.weights.float()
        )
        torch.testing.assert_close(after[320 + found.tokens], mixes, rtol=0, atol=1e-6)
    ids = torch.arange(4, 44).reshape(2, 20)
    torch.testing.assert_close(model(ids).logits[..., :320], load_model(made)(ids).logits, rtol=0, atol=1e-5)


def test_workers_and_repetition_change_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr("adapt.data.workers.START", 0)  # workers from the first document on
    found = []
    for workers in (1, 2, 1):
        monkeypatch.setenv("ADAPT_CACHE", str(tmp_path / f"cache-{len(found)}"))
        raw = focused(base, tmp_path)
        raw["data"] |= {"workers": workers}
        found.append(_tables(converted(raw)[1]))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_texts_of_its_own_are_read_instead_of_the_training_data(tiny_base, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": " ".join(TEXT.split()[::-1])}) for _ in range(30)))
    text = {"source": {"name": "jsonl", "path": str(other)}}
    alone, own = converted(focused(tiny_base, tmp_path)), converted(focused(tiny_base, tmp_path, {"texts": [text]}))
    assert not torch.equal(_tables(alone[1])[0], _tables(own[1])[0])
    replay = focused(tiny_base, tmp_path, {"texts": [text]})
    replay["data"]["train"][0]["replay"] = True
    assert check(resolve(replay)).problems == []
    assert torch.equal(_tables(converted(replay)[1])[0], _tables(own[1])[0])


@dataclass(frozen=True, kw_only=True)
class FirstSeenConfig:
    scale: float = 1.0
    """Of the rows."""


def first_seen(config: FirstSeenConfig):
    """An initialiser of a user's: each new token starts as the token before its first occurrence, where that is an old one."""

    def rows(given: Table) -> torch.Tensor:
        found, number = given.means(), {token: i for i, token in enumerate(given.extension.ids)}
        for document in given.extension.documents((), 10_000):
            for before, token in pairwise(document.tolist()):
                place = number.pop(token, None)
                if place is not None and before < len(given.rows):
                    found[place] = given.rows[before]
        return config.scale * found

    return rows


def test_an_initialiser_of_a_users_reads_texts_too(tiny_base, tmp_path):
    """By its dotted path; nothing of the package knows it."""
    conversion = {"name": "vocabulary", "init": {"name": "tests.conversion.test_focus.first_seen", "scale": 2.0}}
    raw = extending(tiny_base, tmp_path, model={"conversions": [conversion]})
    assert check(resolve(raw)).problems == []
    (old,), model = converted(raw)
    ids = load_tokenizer(resolve(raw).stages[0])(
        json.loads((tmp_path / "pt.jsonl").read_text().splitlines()[0])["text"]
    )
    first = {token: before for before, token in reversed(list(pairwise(ids["input_ids"]))) if token >= 320}
    told = {token: before for token, before in first.items() if before < 320}
    new = _tables(model)[0][320:]
    assert told
    for token, before in told.items():
        assert torch.equal(new[token - 320], 2 * old[before])


def test_without_an_extension_there_is_nothing_to_read():
    given = table()
    with pytest.raises(UserError, match="focus learns from texts"):
        start(Table(given.rows, given.trained, given.pieces, "input"))


def test_max_tokens_is_shared_among_the_texts(tiny_base, tmp_path):
    recipe = resolve(focused(tiny_base, tmp_path)).stages[0]
    every = Extension(recipe, range(320, 360)).documents((), 10_000_000)
    assert [int(i) for i in every.shards[0].document_offsets[:3]] == [0, *np.cumsum([len(d) for d in every])[:2]]
    few = list(Extension(recipe, range(320, 360)).documents((), 1))
    assert len(few) == 1
    source = decode({"name": "jsonl", "path": str(tmp_path / "pt.jsonl")}, SourceChoice)
    both = Extension(recipe, range(320, 360)).documents((Text(source=source), Text(source=source)), 300)
    assert both.share == 150
    assert len(both.shards) == 2


def test_validate_reads_no_text_and_names_what_is_wrong(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("adapt.conversion.texts.Extension.documents", None)
    assert check(resolve(focused(tiny_base, tmp_path))).problems == []
    wrong = focused(tiny_base, tmp_path, {"min_count": 0, "dim": 0})
    wrong["data"]["train"][0]["replay"] = True
    found = [str(p) for p in check(resolve(wrong)).problems]
    where = "model.conversions[0].init"
    assert f"{where}: min_count=0 must be 1 or more; 10 is the default" in found
    assert f"{where}: dim=0 must be 1 or more; 100 is the default" in found
    assert any(p.startswith(f"{where}: all of data.train is replay") for p in found)
    missing = focused(tiny_base, tmp_path, {"texts": [{"source": {"name": "jsonl", "path": "nowhere.jsonl"}}]})
    (found,) = check(resolve(missing)).problems
    assert found.where == where
    assert "texts[0].source" in found.what
    assert "nowhere.jsonl" in found.what


def test_what_is_wrong_with_texts_is_said_with_its_key(tiny_base, tmp_path):
    for init, where in (
        ({"name": "focus", "min_count": 10_000}, "model.conversions[0].init.min_count"),
        ({"name": "blend", "of": {"name": "focus", "min_count": 10_000}}, "model.conversions[0].init.of.min_count"),
    ):
        raw = extending(tiny_base, tmp_path, model={"conversions": [{"name": "vocabulary", "init": init}]})
        with pytest.raises(UserError, match="no new token occurs so often") as error:
            converted(raw)
        assert [p.where for p in error.value.problems] == [where]
