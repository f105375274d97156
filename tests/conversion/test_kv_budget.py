"""A budget of cache for the whole model, shared out over its layers by what each step of rank keeps."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt.config import resolve
from adapt.conversion import latent_student
from adapt.conversion.base import apply_conversions, plan_conversions
from adapt.conversion.latent_ranks import allocated, evenly, latent_room
from adapt.conversion.latent_shape import LatentShape, TeacherShape, kv_ratio
from adapt.errors import StopRequested
from adapt.pretrained import load_config, load_model, load_tokenizer
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.conversion.test_xecomla import elsewhere, made
from tests.train.test_fit import assert_same_run, stop_after

MOST = 40


def lost(energies, ranks, ballast: int = 0) -> float:
    return sum(sum(e[r - ballast :]) for e, r in zip(energies, ranks, strict=True))


@st.composite
def cases(draw):
    spectrum = st.lists(st.floats(0, 10), min_size=MOST, max_size=MOST).map(lambda e: sorted(e, reverse=True))
    energies = draw(st.lists(spectrum, min_size=1, max_size=4))
    return energies, draw(st.integers(8 * len(energies), 8 * (MOST // 8 + 1) * len(energies)))


@given(cases(), st.sampled_from([0, 1]))
@settings(max_examples=60, deadline=None)
def test_a_budget_is_used_up_and_nothing_is_better(case, ballast):
    """Multiples of 8 within the budget, and as much of it as they can take; of all such ranks those that lose least
    (tried one by one), so moving a step between two layers gains nothing."""
    energies, room = case
    ranks = allocated(energies, room, MOST, ballast)
    assert all(8 <= r <= MOST and r % 8 == 0 for r in ranks)
    assert sum(ranks) == min(room // 8 * 8, MOST * len(ranks))
    others = itertools.product(range(8, MOST + 1, 8), repeat=len(ranks))
    best = min(lost(energies, o, ballast) for o in others if sum(o) == sum(ranks))
    assert lost(energies, ranks, ballast) <= best + 1e-9


@given(cases())
@settings(max_examples=60, deadline=None)
def test_more_budget_takes_rank_from_no_layer(case):
    energies, room = case
    less, more = allocated(energies, room, MOST), allocated(energies, room + 8, MOST)
    assert all(a <= b for a, b in zip(less, more, strict=True))


@given(cases(), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_equal_layers_get_equal_ranks(case, layers):
    energies, steps = [case[0][0]] * layers, case[1] // 8
    ranks = allocated(energies, 8 * layers + 8 * steps, MOST)
    assert max(ranks) - min(ranks) <= 8
    whole = allocated(energies, 8 * layers * min(1 + steps, MOST // 8), MOST)
    assert len(set(whole)) == 1
    assert ranks == evenly(layers, 8 * layers + 8 * steps, MOST)


@given(st.integers(0, 29), st.floats(0.1, 1.0))
def test_the_room_is_what_the_budget_leaves(stay, share):
    """The cache is at most the budget's, and one number more for each layer would not be."""
    teacher, layers, rope = TeacherShape(576, 9, 3, 64), 30, 32
    converted = layers - stay
    room = latent_room(share, teacher, layers, converted, rope)

    def ratio(numbers):
        shapes = [LatentShape(numbers / converted, 32, rope, 64)] * converted
        return kv_ratio([*shapes, *[None] * stay], teacher)

    assert ratio(room) <= share + 1e-9
    assert ratio(room + 1) > share


WISH = {"kv_rank": None, "kv_budget": 0.4, "rope_dim": 4}
LAYERS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The keys and values of its first layer have rank 2."""
    model = tiny.tiny_model(num_hidden_layers=LAYERS, num_key_value_heads=4)
    with torch.no_grad():
        for p in (model.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.v_proj.weight):
            p.copy_(torch.randn(len(p), 2) @ torch.randn(2, p.shape[1]))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def ranks_of(config) -> list[int]:
    return config.mixer_options["latent"]["kv_rank"]


def test_ranks_go_where_there_is_energy(base, tmp_path):
    """0.4 of 3 x 64 numbers, less three keys of 4, is 64 for the latents: 16 would be in every layer, and 16 more."""
    recipe = resolve(made(base, tmp_path, WISH)).recipe
    decided = {}
    model = apply_conversions(recipe, load_model(recipe), load_tokenizer(recipe), decided)
    ranks = ranks_of(model.config)
    assert ranks[0] == 8
    assert sum(ranks) == 64
    planned, _ = plan_conversions(recipe, load_config(recipe.model), None)
    assert ranks_of(planned) == [24, 24, 16], "without weights all layers are alike"
    text = decided["model.conversions[0]"]["text"]
    assert text.startswith(
        f"latents of {', '.join(map(str, ranks))}: 76 numbers of cache per token, 39.6% of the base's"
    )
    assert f"pads all of them to {max(ranks)}" in text
    again = apply_conversions(recipe, load_model(recipe), load_tokenizer(recipe), decided)
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in model.state_dict().items())


def test_layers_that_stay_count_whole(base, tmp_path):
    recipe = resolve(made(base, tmp_path, WISH | {"layers": [0, 2], "kv_budget": 0.6})).recipe
    model = apply_conversions(recipe, load_model(recipe), load_tokenizer(recipe))
    first, kept, last = ranks_of(model.config)
    assert kept is None
    assert first + last == int(0.6 * 192) - 64 - 8 - (int(0.6 * 192) - 72) % 8


@pytest.mark.parametrize("target", ["hf", "code"])
def test_an_export_says_what_its_cache_costs(target, base, tmp_path):
    """Bytes that are really kept while decoding: the stock class pads to the largest rank, our own does not."""
    assert fit(resolve(made(base, tmp_path, WISH, trainer={"steps": 1}, export={"target": target}))) == 0
    run = tmp_path / "runs" / "tiny"
    decided = json.loads(next((run / "checkpoints").glob("step-1/state.json")).read_text())["decided"]
    ranks = decided["model.conversions[0]"]["kv_ranks"]
    held = json.loads((run / "export" / "adapt.json").read_text())["export"]["cache_bytes_per_token"]
    assert held == 4 * (sum(ranks) + 4 * LAYERS if target == "code" else LAYERS * (max(ranks) + 4))
    assert f"{held:,.0f} bytes per token" in (run / "export" / "README.md").read_text()
    assert ("pads all of them" in (run / "log.txt").read_text()) == (target == "hf")
    shown = elsewhere(run / "export", target == "code")
    assert shown["module"].startswith("transformers_modules" if target == "code" else "transformers.models.deepseek_v3")
    assert shown["same"] < 1e-4


def test_a_run_goes_on_with_the_ranks_it_had(base, tmp_path, monkeypatch):
    """From its checkpoint: spectra are not compared again."""
    straight, broken = (
        made(base, tmp_path, WISH, run={"name": n}, trainer={"steps": 2}) for n in ("straight", "broken")
    )
    fit(resolve(straight))
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 1)
        fit(resolve(broken))
    monkeypatch.setattr(latent_student, "free_ranks", lambda *a: pytest.fail("ranks were chosen again"))
    fit(resolve(broken), "yes")
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "broken")


REFUSED = {
    "no room": ({"kv_budget": 0.15}, ".kv_budget", "0.188 is the least here"),
    "no room beside layers that stay": ({"kv_budget": 0.4, "layers": [0]}, ".kv_budget", "and 2 layers that stay"),
    "more than full rank": ({"kv_budget": 1.0}, ".kv_budget", "use at most 0.562"),
    "two sizes": ({"kv_rank": 16}, "", "give one of them"),
    "no share": ({"kv_budget": 1.5}, "", "kv_budget=1.5 is a share"),
    "drawn": ({"start": "random"}, "", "kv_budget is of singular values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_budgets_that_cannot_be_are_refused_by_name(case, base, tmp_path):
    wish, where, says = REFUSED[case]
    found = problems(resolve(made(base, tmp_path, WISH | wish)))
    assert any(p.where == f"model.conversions[0]{where}" and says in p.what for p in found), found
