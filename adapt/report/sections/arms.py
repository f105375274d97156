"""Compared runs against everything they cost: the loss over steps, over tokens and over seconds of training, and what
each optimizer kept in memory for it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.components import sections
from adapt.report.data import RunData, is_number, number
from adapt.report.drawing import QUIET, drawing
from adapt.report.sections.curves import smooth
from adapt.report.sections.forgetting import table
from adapt.report.sections.pareto import rate

AXES = {"step": "optimizer steps", "tokens": "training tokens", "seconds": "seconds of training"}
LAST = 0.1
"""The training loss at the end is the mean over this share of the logged steps: single steps are noise."""


@dataclass(frozen=True, kw_only=True)
class ArmsConfig:
    order: int = 5
    """Place on the page; lower comes first."""
    title: str = "Against steps, tokens and seconds"
    """Heading."""


@sections.register("arms")
def arms(config: ArmsConfig):
    def html(runs: list[RunData]) -> str | None:
        trained = [run for run in runs if run.train]
        if len(trained) < 2:
            return None
        metric = metric_of(trained)
        rows = [("training loss", [_plot(trained, axis, "loss") for axis in AXES])]
        if metric:
            rows.append((metric.removeprefix("eval/"), [_plot(trained, axis, metric) for axis in AXES]))
        plots = "".join(
            f"<figure><figcaption>{escape(what)}</figcaption>{svg}</figure>" for what, row in rows for svg in row if svg
        )
        return f'{_legend(trained)}<div class="plots">{plots}</div>{_table(trained, metric)}{NOTE}'

    return html


NOTE = (
    '<p class="quiet">Seconds are those of training steps, without evaluation and checkpoints. The training loss is '
    f"smoothed; in the table it is the mean over the last {LAST:.0%} of the steps. Optimizer state is measured after the "
    "first update, over all ranks, and given as a multiple of the first arm's, too.</p>"
)


def metric_of(runs: list[RunData]) -> str | None:
    """The held-out metric that is drawn: the one the recipe calls best, else the first that all runs have."""
    best = f"eval/{runs[0].setting('evaluation.best')}"
    keys = dict.fromkeys(key for line in runs[0].evaluations for key in line if key.startswith("eval/"))
    shared = [key for key in keys if all(run.points(key) for run in runs)]
    return best if best in shared else next(iter(shared), None)


def series(run: RunData, axis: str, key: str) -> list[tuple[float, float]]:
    """(place on the axis, value); the start is at 0 on each of them."""
    lines = run.evaluations if key.startswith("eval/") else run.train
    places = [(0 if line["step"] == 0 else line.get(axis), line.get(key)) for line in lines]
    return [(x, y) for x, y in places if is_number(x) and is_number(y)]


def _plot(runs: list[RunData], axis: str, key: str) -> str:
    found = [(run, series(run, axis, key)) for run in runs]
    if not any(len(points) > 1 for _, points in found):
        return ""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for run, points in found:
            if not points:
                continue
            places, values = zip(*points, strict=True)
            if key.startswith("eval/"):
                axes.plot(places, values, color=run.colour, linewidth=1.6, marker="o", markersize=3.5)
            else:
                axes.plot(places, values, color=run.colour, linewidth=0.8, alpha=0.25)
                axes.plot(places, smooth(values), color=run.colour, linewidth=1.6)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=axis != "seconds"))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="y", scilimits=(-3, 6), useMathText=False)
        if axis == "tokens":
            axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.set_xlabel(AXES[axis], color=QUIET)

    return drawing(draw, f"{key.removeprefix('eval/')} against {AXES[axis]}")


def short(tokens: float) -> str:
    """1500000 -> 1.5M"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:g}"


def _table(runs: list[RunData], metric: str | None) -> str:
    heads = ["arm", "optimizer", "lr"]
    heads += [f"{metric.removeprefix('eval/')}, end", "best"] if metric else []
    heads += ["training loss, end", "tokens/s", "training", "optimizer state"]
    return table(heads, [_row(run, runs[0], metric) for run in runs], 2)


def _row(run: RunData, first: RunData, metric: str | None) -> list[str]:
    dot = f'<span class="dot" style="background:{run.colour}"></span>'
    name = f'<span style="white-space:nowrap">{dot}{escape(run.name)}</span>'
    cells = [name, escape(str(run.setting("optimizer.name") or "")), rate(run)]
    if metric:
        points = run.points(metric)
        step, best = min(points, key=lambda point: point[1])
        cells += [number(points[-1][1]), f"{number(best)} at {number(step)}"]
    losses = [value for _, value in run.points("loss")]
    tail = losses[-max(1, round(LAST * len(losses))) :]
    cells.append(number(sum(tail) / len(tail)) if tail else "")
    last = run.train[-1]
    seconds, tokens = last.get("seconds"), last.get("tokens")
    timed = is_number(seconds) and seconds > 0
    cells.append(number(round(tokens / seconds)) if timed and is_number(tokens) else "")
    cells.append(duration(seconds) if timed else "")
    return [*cells, _state(run.optimizer_state_bytes, first.optimizer_state_bytes)]


def _state(kept: int | None, reference: int | None) -> str:
    """What it kept, and as a multiple of what the first arm did."""
    if kept is None:
        return ""
    return f"{kept / 2**20:,.1f} MiB" + (f" ({kept / reference:.2f} x)" if reference else "")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _legend(runs: list[RunData]) -> str:
    names = "".join(
        f'<span><span class="dot" style="background:{run.colour}"></span>{escape(run.name)}</span>' for run in runs
    )
    return f'<div class="legend">{names}</div>'
