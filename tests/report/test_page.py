"""The page: complete, self-contained, safe, and there even when half of the run is missing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from adapt.components import sections
from adapt.errors import UserError
from adapt.report import build
from adapt.report.data import number
from adapt.report.sections.evaluation import change

EVIL = "<script>alert('x')</script>"


def make_run(folder, name, steps=20, whole=True):
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f'run: {{name: "{name}"}}\nmodel: {{base: "{EVIL}"}}\nobjective: {{name: demo}}\n')
    if not whole:
        return run
    lines = [{"step": 0, "stage": 0, "eval/bpb/held-out": 1.5, "eval/forgetting/old": 0.0}]
    lines += [
        {"step": s, "stage": s // 12, "tokens": 64 * s, "loss": 4 / s, "loss/ar": 3 / s, "lr": 1e-3, "grad_norm": 1.0}
        | {
            "loss/relative_error/00": 1 / s,
            "loss/relative_error/12": 0.5,
            "tokens_per_s": 100.0,
            "block_size": 2 + s // 10,
            "time": 0.0,
        }
        for s in range(1, steps + 1)
    ]
    if steps > 5:
        lines[5]["loss"] = None  # a loss that was not finite
    lines += [{"step": s, "stage": 0, "eval/bpb/held-out": 1.5 - s / 80} for s in (5, 10, 15, steps)]
    lines[-1] |= {f"eval/ablation/{part}/bpb/{EVIL}": 1.25 for part in ("whole", "recurrent", EVIL)}
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '[]\n7\n{"step": 21, "lo')
    sample = {"prompt": EVIL, "sampler": "ar", "text": "ab", "tokens_per_forward": 1.0, "forwards": 2}
    (run / "samples.json").write_text(json.dumps([sample | {"reveal": [[EVIL, 0], ["b", 3]]}, {"text": EVIL}]))
    step = {"step": EVIL, "in": 5000, "out": 679, "changed": 77, "bytes_in": 9, "bytes_out": 8765, "words_out": 1543}
    steps_of_data = [{"dropped": {"duplicate": 4321, "empty": 0}}, step]
    train = {"label": EVIL, "tokens": 12345, "licence": "MIT", "steps": steps_of_data}
    (run / "data.json").write_text(
        json.dumps({"train": [train], "eval": {"x": {"label": "x"}}, "fingerprint": "f" * 64})
    )
    grid = {"suite": "passkey", "rows": ["256", "512"], "columns": ["0-50", EVIL], "trials": 9}
    grids = [{"step": s, **grid, "cells": [[0.0, s / 40], [0.125, None]]} for s in (0, 10, steps)]
    positions = {
        "step": 0,
        "suite": "nll_by_position",
        "unit": "nats per token",
        "rows": [EVIL],
        "columns": ["0-8", EVIL],
    }
    grids += [positions | {"model": model, "cells": [[2.0, 1.0]], "trials": 3} for model in ("", EVIL)]
    grids += [{**grid, "step": 0, "suite": "half_lives", "unit": "% of channels", "cells": [[0.5, 0.5], [None, 1.0]]}]
    (run / "grids.jsonl").write_text("".join(json.dumps(x) + "\n" for x in grids) + '{"step": 5, "rows": 3}\n{"st')
    (run / "environment.json").write_text(json.dumps({"hardware": {"cores": 2, "cpu": "a CPU", "gpus": []}}))
    return run


class Checked(HTMLParser):
    """Every tag that opens closes, and nothing refers to the outside."""

    VOID = ("meta", "link", "img", "br", "hr", "input", "path", "use", "rect")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_every_part_of_a_run_is_on_one_self_contained_page(tmp_path):
    page = build(make_run(tmp_path, "one"), [], None)
    assert page == tmp_path / "one" / "report.html"
    html = page.read_text()
    alone = set(sections.names()) - {"arms", "pareto"}  # those are of compared runs
    assert all(f'<section id="{name}">' in html for name in alone)
    for key in ("loss", "loss/ar", "lr", "grad_norm", "tokens_per_s", "block_size", "eval/bpb/held-out"):
        assert f"<figcaption>{key}</figcaption>" in html
    for text in (
        "1.500",
        "1.250",
        "−16.7 %",
        "12,345",
        "4,321 duplicate",
        "8,765",
        "1,543",
        "2 cores of a CPU",
        "1,280",
        "denoising step 3",
    ):
        assert text in html, text
    assert "prefers-color-scheme: dark" in html
    assert all(reference.startswith("#") for reference in Checked(html).references)
    assert not re.search(r"url\((?!#)|@import|http", html)


def test_text_of_users_and_models_stays_text(tmp_path):
    html = build(make_run(tmp_path, "one"), [], None).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_compared_runs_are_drawn_over_each_other(tmp_path):
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "t<w>$o", steps=10), make_run(tmp_path / "deeper", "one")]
    out = build(runs[0], runs[1:], tmp_path / "new" / "three.html")
    assert out == tmp_path / "new" / "three.html"
    html = out.read_text()
    Checked(html)
    for name in ("one (1)", "t&lt;w&gt;$o", "one (3)"):
        assert html.count(name) >= 4, name
    colours = set(re.findall(r'class="dot" style="background:(#\w+)"', html))
    assert len(colours) == 3
    assert all(html.count(f"stroke: {c}") >= 7 for c in colours)


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    html = build(make_run(tmp_path, "begun", whole=False), [], None).read_text()
    assert 'id="summary"' in html
    assert 'id="curves"' not in html


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.json", "data.json", "environment.json", "config.yaml"])
@pytest.mark.parametrize("content", ["", "{", "null", "[1, 2]", '"x"', "{}"])
def test_a_broken_file_costs_its_section_only(tmp_path, name, content):
    run = make_run(tmp_path, "broken", steps=3)
    (run / name).write_text(content)
    Checked(build(run, [], None).read_text())


def test_a_repeated_step_counts_once(tmp_path):
    """After a rewind or a resume the later line is the one that happened."""
    from adapt.report.data import read

    run = make_run(tmp_path, "again", steps=3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"step": 2, "loss": 9.0}) + "\n")
    assert read(run, "again", "#000").points("loss") == [(1, 4.0), (2, 9.0), (3, 4 / 3)]


def test_a_user_adds_a_section(tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class MineConfig:
        order: int = 15
        title: str = "Mine & yours"

    def mine(config: MineConfig):
        return lambda runs: f"<p>{len(runs)} run</p>"

    mine.__annotations__["config"] = MineConfig
    sections.names()
    monkeypatch.setattr(sections, "_entries", dict(sections._entries))
    sections.register("mine")(mine)
    html = build(make_run(tmp_path, "one"), [], None).read_text()
    assert "<h2>Mine &amp; yours</h2>\n<p>1 run</p>" in html
    assert html.index('id="summary"') < html.index('id="mine"') < html.index('id="evaluation"')


def test_numbers_in_tables():
    assert [number(x) for x in (None, float("nan"), 3, 12345, 0.8, 1.23456, 123456.7)] == [
        *("", "", "3", "12,345", "0.8000", "1.235", "123,457")
    ]
    assert [change(2.0, 1.5), change(0.0, 1.0), change(None, 1.0), change(1.0, 1.5)] == ["−25.0 %", "", "", "+50.0 %"]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        build(tmp_path, [], None)


def test_heat_maps_show_the_first_and_the_last_grid(tmp_path):
    html = build(make_run(tmp_path, "one"), [], None).read_text()
    section = html[html.index('<section id="heatmaps">') :]
    section = section[: section.index("</section>")]
    assert section.count("<svg") == 1
    assert "passkey, % right, of 9 trials a cell" in section
    words = re.findall(r">([^<>]+)</text>", section)
    assert [w for w in words if w.startswith("step")] == ["step 0", "step 20"]
    assert words.count("12") == 2  # 0.125 of both
    assert words.count("50") == 1  # 20 / 40 of the last


def test_a_grid_of_another_shape_is_not_compared(tmp_path):
    run = make_run(tmp_path, "one")
    grid = {"step": 30, "suite": "passkey", "rows": ["256"], "columns": ["0-100"], "cells": [[1.0]], "trials": 9}
    (run / "grids.jsonl").open("w").write(json.dumps({**grid, "step": 0, "rows": ["128"]}) + "\n" + json.dumps(grid))
    html = build(run, [], None).read_text()
    assert "step 30</text>" in html
    assert "step 0</text>" not in html


def test_a_folder_of_arms_has_a_page_of_its_runs_in_the_recipes_order(tmp_path):
    folder = tmp_path / "arms"
    for name in ("a", "b", "c"):
        make_run(folder, name, whole=name != "c")
    (folder / "recipe.yaml").write_text("arms: {b: {}, a: {}, not-yet: {}}\n")
    page = build(folder, [], None)
    assert page == folder / "comparison.html"
    html = page.read_text()
    Checked(html)
    assert "<title>arms: b against a " in html


def test_what_a_run_did_not_log_is_left_out_of_the_comparison(tmp_path):
    """Runs of older versions have no seconds and no optimizer state."""
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two", steps=10)]
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"step": 1, "optimizer_state_bytes": 3 * 2**20}) + "\n")
    html = build(runs[0], runs[1:], None).read_text()
    section = html[html.index('<section id="arms">') :]
    section = section[: section.index("</section>")]
    assert "bpb/held-out against training tokens" not in section, "its evaluations have no tokens, but for the start"
    assert "loss against training tokens" in section
    assert "seconds of training" not in section.partition("</table>")[0]
    assert "3.0 MiB (1.00 x)" in section


def test_places_of_a_comparison():
    from adapt.report.sections.arms import duration, short

    assert [short(x) for x in (0, 500, 20000, 1.5e6, 2e9)] == ["0", "500", "20k", "1.5M", "2B"]
    assert [duration(x) for x in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
