"""Gained and forgotten: the numbers by hand, and the pictures they go into."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.report import build
from adapt.report.data import read
from adapt.report.forgetting import Gap, Outcome, front, outcome, replay_fraction, sweep
from tests.report.test_page import Checked


def make_run(folder, name, *, lr=1e-4, replay=0.25, gain=0.4, forgotten=0.1, alphas=True):
    run = folder / name
    run.mkdir(parents=True)
    data = [{"source": "a", "weight": 1 - replay}, {"source": "b", "weight": replay, "replay": True}]
    config = {"run": {"name": name}, "optimizer": {"name": "adamw", "lr": lr}, "data": {"train": data}}
    (run / "config.yaml").write_text(json.dumps(config))
    lines = []
    for step, share, deep in ((0, 0, 0), (5, 0.5, 2), (10, 0.8, 3), (15, 0.9, 0.2), (20, 1, 1)):
        worst = {"eval/forgetting/old": deep * forgotten, "eval/forgetting/worst": deep * forgotten}
        lines.append({"step": step, "eval/bpb/new": 2 - share * gain, "eval/bpb/old": 1 + deep * forgotten, **worst})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if alphas:
        points = [{"alpha": a, "results": {"bpb/new": 2 - a * gain, "forgetting/worst": a * a * forgotten}} for a in (0, 0.5, 1)]  # fmt: skip
        found = {"points": points, "alpha": 0.5, "why": "because <b>", "drift": {"embed_tokens": 0.01, "layer 0": 0.02}}
        (run / "interpolation.json").write_text(json.dumps(found))
    return run


def test_the_numbers_are_those_of_the_definitions(tmp_path):
    run = read(make_run(tmp_path, "one"), "one", "#000")
    gap = Gap.of(run.points("eval/forgetting/old"))
    assert (gap.depth, gap.deepest, gap.recovered, gap.final) == (pytest.approx(0.3), 10, 15, 0.1)
    found = outcome(run)
    assert (found.gain, found.forgetting) == (pytest.approx(0.4), pytest.approx(0.1))
    assert found.efficiency == pytest.approx(4)
    assert Outcome(0.4, -0.2).efficiency == pytest.approx(400)  # nothing forgotten: G / epsilon
    assert replay_fraction(run) == 0.25
    assert [(a, o.gain, o.forgetting) for a, o in sweep(run)] == [
        (0, 0.0, 0.0),
        (0.5, pytest.approx(0.2), pytest.approx(0.025)),
        (1, pytest.approx(0.4), pytest.approx(0.1)),
    ]


def test_a_gap_that_stays_open_is_not_recovered():
    assert Gap.of([(0, 0.0), (5, 0.3), (10, 0.2)]).recovered is None
    assert Gap.of([(0, 0.0), (5, -0.3)]) == Gap(0.0, 0, None, -0.3)


outcomes = st.builds(Outcome, st.integers(-3, 3).map(float), st.integers(-3, 3).map(float))


@given(st.lists(outcomes, min_size=1, max_size=8))
def test_the_front_is_what_no_other_beats(found):
    best = front(found)
    assert any(best)
    for one, good in zip(found, best, strict=True):
        better = [o for o in found if o != one and o.gain >= one.gain and o.forgetting <= one.forgetting]
        assert good == (not better)


def test_one_run_shows_curves_drift_and_sweep(tmp_path):
    html = build(make_run(tmp_path, "one"), [], None).read_text()
    assert '<section id="forgetting">' in html
    assert '<section id="pareto">' not in html
    for text in ("forgetting, bits per byte", "adaptation gain", "drift of each layer", "+0.3000", "exported: α 0.5"):
        assert text in html, text
    assert "because &lt;b&gt;" in html
    assert all(reference.startswith("#") for reference in Checked(html).references)


def test_compared_runs_are_points_with_their_settings(tmp_path):
    runs = [
        make_run(tmp_path, "bold", lr=1e-3, replay=0.0, gain=0.6, forgotten=0.3),
        make_run(tmp_path, "care<ful", lr=1e-4, replay=0.25, gain=0.3, forgotten=0.05),
        make_run(tmp_path, "beaten", lr=1e-4, replay=0.5, gain=0.2, forgotten=0.2, alphas=False),
    ]
    html = build(runs[0], runs[1:], tmp_path / "all.html").read_text()
    Checked(html)
    section = html[html.index('<section id="pareto">') :]
    section = section[: section.index("</section>")]
    for text in ("lr 1e-3, replay 0%", "lr 1e-4, replay 25%", "lr 1e-4, replay 50%", "care&lt;ful"):
        assert text in section, text
    assert section.count('<td class="n">front</td>') == 2
    assert "care<ful" not in html


def test_runs_without_guards_have_no_such_sections(tmp_path):
    run = make_run(tmp_path, "one", alphas=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if "forgetting" not in k} for line in lines]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)))
    html = build(run, [run], tmp_path / "page.html").read_text()
    assert 'id="forgetting"' not in html
    assert 'id="pareto"' not in html
