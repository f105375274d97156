"""Where new rows start: the formulas of the tokenizer-extension spec, section C.1."""

from __future__ import annotations

import math

import pytest
import torch

from adapt.components import InitialiserChoice, initialisers
from adapt.config import decode
from adapt.conversion.initialisers.base import Table, rescaled
from adapt.conversion.untrained import trained_rows
from tests import tiny
from tests.conversion.said import Said, chatter

PIECES = [(3, 4), (5, 6, 7), (), (8, 8, 9, 10)]


def table(side="input", d=6, pieces=PIECES, rows=50, seed=0) -> Table:
    torch.manual_seed(3)
    trained = torch.ones(rows, dtype=torch.bool)
    trained[:3] = False
    extension = Said(range(rows, rows + len(pieces)), chatter(range(rows + len(pieces))))
    return Table(torch.randn(rows, d) * torch.arange(1, d + 1) + 1, trained, pieces, side, seed, extension)


def start(choice, given: Table) -> torch.Tensor:
    return decode(choice, InitialiserChoice).build()(given)


@pytest.mark.parametrize("side", ["input", "output"])
def test_mean_is_that_of_the_trained_rows(side):
    given = table(side)
    assert torch.equal(start("mean", given), given.rows[3:].mean(0).expand(4, -1))


def test_invariant_11_subword_mean_is_the_mean_of_the_expansion():
    given = table()
    found = start("subword_mean", given)
    for row, pieces in zip(found, PIECES, strict=True):
        expected = given.rows[list(pieces)].mean(0) if pieces else given.mean
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "side", "weights"),
    [
        ("subword_first", "input", [1, 0, 0]),
        ("subword_first", "output", [1, 0, 0]),
        ("subword_last", "input", [0, 0, 1]),
        ("subword_last", "output", [1, 0, 0]),
        ("subword_weighted", "input", [1 / 6, 2 / 6, 3 / 6]),
        ("subword_weighted", "output", [3 / 6, 2 / 6, 1 / 6]),
    ],
)
def test_weights_of_the_pieces(name, side, weights):
    given = table(side)
    expected = sum(w * given.rows[i] for w, i in zip(weights, PIECES[1], strict=True))
    torch.testing.assert_close(start(name, given)[1], expected)


def test_a_blend_lies_between():
    given = table()
    assert torch.equal(start({"name": "blend", "share": 0}, given), start("mean", given))
    torch.testing.assert_close(start({"name": "blend", "share": 1.0}, given), start("subword_mean", given))
    half = start({"name": "blend", "of": "subword_first"}, given)
    torch.testing.assert_close(half, (start("mean", given) + start("subword_first", given)) / 2)


def test_normal_cov_has_the_mean_and_alpha_times_the_covariance_of_the_trained_rows():
    given = table(pieces=[()] * 40_000)
    found, trained = start({"name": "normal_cov", "alpha": 0.25}, given), given.rows[3:]
    assert torch.equal(found, start({"name": "normal_cov", "alpha": 0.25}, given))  # drawn alike every time
    scale = trained.std(0)
    assert ((found.mean(0) - given.mean) / scale).abs().max() < 0.01
    correlated = (torch.cov(found.T) - 0.25 * torch.cov(trained.T, correction=0)) / scale.outer(scale)
    assert correlated.abs().max() < 0.01
    other = start({"name": "normal_cov", "alpha": 0.25}, table(pieces=[()] * 40_000, seed=1))
    assert not torch.equal(found, other)


def test_normal_cov_of_a_singular_covariance_stays_in_its_span():
    given = table(d=80, rows=20, pieces=[()] * 5)
    found = start({"name": "normal_cov", "alpha": 1.0}, given) - given.mean
    directions = (given.rows[3:] - given.mean).double()
    rest = found.double() - found.double() @ torch.linalg.pinv(directions) @ directions
    assert rest.norm() < 1e-4 * found.norm()


@pytest.mark.parametrize("d", [8, 80])
def test_hf_draws_as_transformers_does(d, monkeypatch):
    """The same numbers drawn, transformers' own resize gives the same rows (d=80: a singular covariance of 20 rows,
    where it takes the mean)."""
    model = tiny.tiny_model(vocab_size=20 if d > 20 else 500, hidden_size=d, head_dim=8, tie_word_embeddings=True)
    old = model.get_input_embeddings().weight.detach().clone()
    given = Table(old, torch.ones(len(old), dtype=torch.bool), [()] * 7, "input")
    drawn = torch.randn(7, d)
    monkeypatch.setattr(Table, "normal", lambda self: drawn)
    monkeypatch.setattr("torch.distributions.multivariate_normal._standard_normal", lambda *_, **__: drawn)
    model.resize_token_embeddings(len(old) + 7, mean_resizing=True)
    found = start("hf", given)
    torch.testing.assert_close(found, model.get_input_embeddings().weight[len(old) :].detach(), rtol=0, atol=1e-6)
    assert bool((found == found[0]).all()) == (d == 80)


def test_rescaled_rows_are_as_far_from_the_mean_as_trained_ones():
    given = table()
    found = rescaled(given, start("subword_mean", given)) - given.mean
    usual = (given.rows[3:] - given.mean).norm(dim=1).median()
    torch.testing.assert_close(found.norm(dim=1)[[0, 1, 3]], usual.expand(3))
    assert found[2].norm() == 0  # a row at the mean has no direction to go
    before = start("subword_mean", given) - given.mean
    assert torch.nn.functional.cosine_similarity(found[:2], before[:2]).min() > 1 - 1e-6


@pytest.mark.parametrize("name", initialisers.names())
@pytest.mark.parametrize("side", ["input", "output"])
def test_every_initialiser_gives_a_finite_row_per_token_and_changes_nothing(name, side):
    given = table(side)
    before = given.rows.clone()
    found = start(name, given)
    assert found.shape == (4, 6)
    assert torch.isfinite(found).all()
    assert torch.equal(given.rows, before)
    assert start(name, table(side, pieces=[(4, 5)])).shape == (1, 6)
    away = start(name, table(pieces=[()]))[0] - given.mean  # no pieces to go by
    assert (away / given.rows[3:].std(0)).abs().max() < 4


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"name": "normal_cov", "alpha": -1.0}, "alpha=-1.0 must be above 0"),
        ({"name": "normal_cov", "alpha": math.inf}, "alpha=inf must be above 0"),
        ({"name": "blend", "share": 1.5}, "share=1.5 must be between 0"),
    ],
)
def test_values_out_of_range_are_refused(choice, says):
    (found,) = decode(choice, InitialiserChoice).config.problems(None)
    assert says in found.what


def test_rows_that_never_trained_are_told_by_name_and_by_their_neighbours():
    """Padding, special and reserved tokens by name; pieces whose rows lie where untrained rows lie by that."""
    tokenizer, model = tiny.tiny_tokenizer(), tiny.tiny_model(vocab_size=330)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[320:] = 0.001 * torch.randn(10, 32)
        rows[[100, 200]] = 0.0001 * torch.randn(2, 32)
        rows[150] = 0
    trained = trained_rows(tokenizer, model.config, rows)
    assert not trained[[0, 1, 2, 3, 100, 150, 200, *range(320, 330)]].any()
    assert trained.sum() == 320 - 4 - 3


def test_where_untrained_rows_look_like_the_others_names_alone_decide():
    tokenizer, model = tiny.tiny_tokenizer(), tiny.tiny_model(vocab_size=330)  # all drawn alike
    trained = trained_rows(tokenizer, model.config, model.get_input_embeddings().weight)
    assert trained[4:320].all()
    assert not trained[320:].any()
