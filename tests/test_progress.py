"""What is shown and what is logged: the numbers of a step, in one line each."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from adapt.config import load
from adapt.errors import UserError
from adapt.train.loggers import JsonlLogger, build_loggers
from adapt.train.progress import Progress

VALUES = {"stage": 0, "tokens": 24576, "loss": 3.25, "loss/ar": 2.5, "loss/masked": 4.0, "lr": 1e-4, "time": 1.0}
VALUES |= {"grad_norm": 1.2, "tokens_per_s": 117.4, "block_size": 4}


def shown(steps, terminal=False, **kwargs):
    out = io.StringIO()
    now = iter(range(0, 1000, 10))
    console = Console(file=out, force_terminal=terminal, width=100)
    progress = Progress(total_steps=40, console=console, clock=lambda: next(now), **kwargs)
    progress.header({"run": "runs/[bold]x"})
    for step, values in steps:
        progress.update(step, values)
    progress.note("saved [here]")
    progress.finish()
    return out.getvalue()


def test_a_line_per_step_where_there_is_no_terminal():
    text = shown([(11, VALUES), (12, VALUES)], start_step=10)
    line = text.splitlines()[-2]
    for part in ("step 12/40", "tokens 24,576", "loss 3.25", "ar 2.5", "masked 4", "grad 1.2", "117 tok/s", "eta 4:40"):
        assert part in line
    assert "runs/[bold]x" in text
    assert "saved [here]" in text


def test_steps_of_the_run_become_steps_of_the_stage():
    assert "step 2/40" in shown([(102, VALUES)], offset=100)


def test_a_terminal_gets_a_live_display():
    text = shown([(1, VALUES), (2, VALUES)], terminal=True)
    assert "2/40" in text
    assert "\x1b[" in text


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_losses_that_are_not_finite_are_said(loss):
    assert "not finite" in shown([(1, {**VALUES, "loss": loss})])


def test_a_learning_rate_that_is_not_finite_breaks_nothing():
    assert "lr not finite" in shown([(1, {**VALUES, "lr": float("inf")})])


def test_time_in_evaluations_is_no_part_of_the_pace():
    now = iter([0.0, 0.0, 10.0, 120.0])  # made, header, step 1, step 2 with an evaluation of 100 s before it
    progress = Progress(total_steps=4, console=Console(file=io.StringIO()), clock=lambda: next(now))
    progress.header({})
    progress.update(1, {})
    progress.leave_out(100.0)
    progress.update(2, {})
    assert progress.eta() == pytest.approx(20.0)


def test_metrics_are_json_lines_on_disk_at_once(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"loss": float("nan"), "lr": 0.5}, step=1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {k: v for k, v in json.loads(line).items() if k != "time"} == {"step": 1, "loss": None, "lr": 0.5}


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(6)) + '{"step": 6, "lo')
    recipe = load("nbdiff", ["logging.tensorboard=false"]).recipe
    build_loggers(recipe, tmp_path, 3)
    assert [json.loads(x)["step"] for x in file.read_text().splitlines()] == [0, 1, 2, 3]


def test_tensorboard_writes_into_the_run_folder(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    for logger in build_loggers(load("nbdiff").recipe, tmp_path, 0):
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.finalize("success")
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("adapt.train.loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging\.wandb"):
        build_loggers(load("nbdiff", ["logging.wandb=x"]).recipe, tmp_path, 0)
