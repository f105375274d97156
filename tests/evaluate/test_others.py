"""What the student is compared with: the base before conversions, and a window as large as the student's state."""

from __future__ import annotations

import json
import re

import pytest
import torch

from adapt.config import decode, resolve
from adapt.config.schema import Evaluation
from adapt.errors import UserError
from adapt.evaluate.others import others, state_sized_windows, window_title
from adapt.models import attention
from adapt.models.window import windowed
from adapt.objectives.base import Models
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.evaluate.test_suites import context, suite
from tests.evaluate.test_verb import run as evaluate
from tests.models.linear import student
from tests.recipes import tiny_recipe

PASSKEY = {"lengths": [260, 300], "depths": 2, "trials": 1}
NIAH = {"lengths": [400], "depths": 1, "trials": 1, "new_tokens": 6}
BOTH = ["teacher", "window"]


def recipe(base, folder, **over):
    suites = [
        {"name": "passkey", **PASSKEY, "compare": BOTH},
        {"name": "niah", **NIAH, "compare": ["teacher"]},
    ]
    made = {
        "model": {"base": str(base), "conversions": [{"name": "lawcat", "layers": [0]}]},
        "objective": "next_token",
        "trainer": {"steps": 2},
        "evaluation": {"suites": suites, "limit": 2, "every": 1},
        "generation": {"prompts": [], "samplers": []},
    }
    return tiny_recipe(base, folder, **made | over)


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADAPT_CACHE", str(folder / "cache"))
        assert fit(resolve(recipe(tiny_base, folder))) == 0
    return folder / "runs" / "tiny"


def lines_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/passkey" in line]


def test_others_are_measured_once_and_the_student_every_time(run):
    first, *later = lines_of(run)
    assert len(later) == 2
    once = {k for k in first if re.search("_(teacher|window)", k)}
    assert {
        "eval/passkey_teacher/260",
        "eval/passkey_nll_window",
        "eval/niah_1_teacher",
        "eval/niah_nll_teacher/1/400",
    } <= once
    assert not any("window" in k and "niah" in k for k in once)
    for line in later:
        assert not once & line.keys()
        assert line.keys() >= first.keys() - once
    grids = [json.loads(line) for line in (run / "grids.jsonl").read_text().splitlines()]
    seen = [(g["step"], g["suite"], g["model"]) for g in grids]
    assert len(set(seen)) == len(seen) == 2 * 3 + 3
    window = "window of 27 tokens"  # (4 x 8 x 9 + 3 x (4 + 2) x 8 numbers) x 4 bytes / (2 x 2 x 8 numbers x 2 bytes)
    assert {(0, "passkey", "teacher"), (0, "passkey", window), (0, "niah_1", "teacher")} <= set(seen)


def test_each_is_the_model_it_is_called(run, tiny_base, capsys):
    """The teacher scores what the base folder does; the window what the base does with a band of its first layer."""
    first = lines_of(run)[0]
    base = attention.use(tiny.tiny_model())
    plain = suite("passkey", **{k: tuple(v) if isinstance(v, list) else v for k, v in PASSKEY.items()})

    def measured(windows):
        def call(fn, *args):
            with torch.no_grad(), windowed(base, windows):
                return fn(Models(base), *args)

        return plain(context(None, call=call, seed=7))

    for name, found in (("teacher", measured({})), ("window", measured({0: 27}))):
        for what in ("passkey", "passkey_nll"):
            for length in ("/260", "/300", ""):
                assert first[f"eval/{what}_{name}{length}"] == pytest.approx(found[f"{what}{length}"], rel=1e-4)
    assert first["eval/passkey_nll_teacher"] != pytest.approx(first["eval/passkey_nll_window"], rel=1e-3)
    assert first["eval/passkey_nll_teacher"] != pytest.approx(first["eval/passkey_nll"], rel=1e-3)


def test_the_report_draws_them_side_by_side(run):
    html = (run / "report.html").read_text()
    section = html[html.index('<section id="heatmaps">') :]
    words = re.findall(r">([^<>]+)</text>", section[: section.index("</section>")])
    titles = [w for w in words if re.match("teacher|window|student", w)]
    assert titles == [
        "teacher", "window of 27 tokens", "student, step 0", "student, step 2",
        "teacher", "student, step 0", "student, step 2",
    ]  # fmt: skip


def test_the_verb_measures_all_of_them(run, capsys):
    assert evaluate(run, "--suite", "passkey", "--json") == 0
    found, before = json.loads(capsys.readouterr().out), lines_of(run)[0]
    for name in BOTH:
        assert found[f"passkey_nll_{name}"] == pytest.approx(before[f"eval/passkey_nll_{name}"], rel=1e-5)
    assert found["passkey_nll"] == pytest.approx(lines_of(run)[-1]["eval/passkey_nll"], rel=1e-3)
    assert [g["model"] for g in found["grids"]] == ["", "teacher", "window of 27 tokens"]
    assert evaluate(run, "--suite", "passkey") == 0
    assert "passkey (window of 27 tokens), % right" in capsys.readouterr().out


def test_a_stage_with_the_base_as_its_teacher_loads_it_once(tiny_base, tmp_path, monkeypatch):
    from adapt.train import teacher

    loads = []
    monkeypatch.setattr(teacher, "load_model", lambda r, load=teacher.load_model: loads.append(r) or load(r))
    made = recipe(tiny_base, tmp_path, objective="logit_distillation", teacher={"base": "self"})
    made["evaluation"]["suites"] = made["evaluation"]["suites"][:1]
    assert fit(resolve(made)) == 0
    assert len(loads) == 1
    assert "eval/passkey_nll_window" in lines_of(tmp_path / "runs" / "tiny")[0]


def test_a_window_holds_the_bytes_of_the_state():
    """State in float32, cache in bfloat16; layer by layer, and nothing for layers that keep their attention."""
    model = student("mamba2", layers=(1,))
    cache = model(input_ids=torch.tensor([[5]]), use_cache=True).past_key_values
    state = sum(x.numel() for x in cache.layers[1].states.values()) * 4
    assert state == (4 * 8 * 8 + 3 * 8 * (4 + 2 * 2)) * 4
    assert state_sized_windows(Models(model)) == {1: state // (2 * 2 * 8 * 2)}
    assert window_title({0: 3, 5: 3}) == "window of 3 tokens"
    assert window_title({0: 3, 5: 1200}) == "window of 3 to 1,200 tokens"
    with pytest.raises(UserError, match="this model has none"):
        state_sized_windows(Models(tiny.tiny_model()))


def test_a_model_without_a_recipe_has_nothing_to_compare_with():
    with pytest.raises(UserError, match="-c RECIPE"):
        next(others(context(None), ("teacher",), "x"))


@pytest.mark.parametrize("name", ["passkey", "niah"])
@pytest.mark.parametrize(
    ("conversions", "compare", "words"),
    [
        ([], ["teacher"], "model.conversions is empty"),
        ([{"name": "mask_token", "token": "<reserved_0>"}], ["window"], "no conversion here makes any"),
        ([{"name": "lawcat"}], ["window", "window"], "names a model twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(name, conversions, compare, words, tiny_base, tmp_path):
    made = recipe(tiny_base, tmp_path, model={"base": str(tiny_base), "conversions": conversions})
    fields = PASSKEY if name == "passkey" else NIAH
    made["evaluation"] = {"suites": [{"name": name, **fields, "compare": compare}]}
    found = [p for p in problems(resolve(made)) if words in p.what]
    assert [p.where for p in found] == ["evaluation.suites[0]"]


def test_rules_cannot_name_what_is_measured_once(tiny_base, tmp_path):
    made = recipe(tiny_base, tmp_path)
    made["evaluation"]["best"] = "passkey_nll_teacher"
    assert any(p.where == "evaluation.best" for p in problems(resolve(made)))
    assert decode(made["evaluation"], Evaluation).suites[0].config.compare == ("teacher", "window")
