"""Every logged number against the step; compared runs drawn over each other."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from adapt.components import sections
from adapt.report.data import RunData, is_number
from adapt.report.figure import QUIET, inline

APART = ("step", "stage", "tokens", "time")
MANY = 60
"""Points from which a running mean is drawn over the raw line."""


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    order: int = 40
    """Place on the page; lower comes first."""
    title: str = "Training"
    """Heading."""


@sections.register("curves")
def curves(config: CurvesConfig):
    def html(runs: list[RunData]) -> str | None:
        lines = [line for run in runs for line in [*run.train, *run.evaluations]]
        keys = dict.fromkeys(k for line in lines for k, v in line.items() if k not in APART and is_number(v))
        keys = [k for k in keys if any(len(run.points(k)) > 1 for run in runs)]
        keys = [k for k in keys if not (k.startswith("loss/") and k.count("/") > 1)]  # of layers: a section of its own
        keys.sort(key=lambda k: k.startswith("eval/"))  # stable: in the order of the log otherwise
        if not keys:
            return None
        legend = "".join(
            f'<span><span class="dot" style="background:{r.colour}"></span>{escape(r.name)}</span>' for r in runs
        )
        legend = f'<div class="legend">{legend}</div>' if len(runs) > 1 else ""
        plots = "".join(f"<figure><figcaption>{escape(k)}</figcaption>{_plot(k, runs)}</figure>" for k in keys)
        return f'{legend}<div class="plots">{plots}</div>'

    return html


def _plot(key: str, runs: list[RunData]) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.2, 2.2), layout="constrained")
        axes = figure.subplots()
        for run in runs:
            _draw(axes, run, key)
        for step in {s for run in runs for s in _stage_starts(run)}:
            axes.axvline(step, color=QUIET, linewidth=0.8, linestyle=":")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(QUIET)
        axes.tick_params(labelsize=8, length=0)
        axes.grid(axis="y", color=QUIET, alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="y", scilimits=(-3, 6), useMathText=False)
        return inline(figure, f"{key} against the step")


def _draw(axes, run: RunData, key: str) -> None:
    points = run.points(key)
    if not points:
        return
    steps, values = zip(*points, strict=True)
    measured = key.startswith("eval/")
    noisy = not measured and len(values) > MANY and _turns(values) > len(values) / 8
    axes.plot(steps, values, color=run.colour, alpha=0.3 if noisy else 1, linewidth=1 if noisy else 1.6,
              marker="o" if measured else None, markersize=3.5)  # fmt: skip
    if noisy:
        axes.plot(steps, _smooth(values), color=run.colour, linewidth=1.7)


def _turns(values) -> int:
    """How often it goes up after down, or down after up."""
    return sum((a < b) != (b < c) for a, b, c in zip(values, values[1:], values[2:], strict=False) if a != b != c)


def _smooth(values) -> list[float]:
    """Mean over a centred window of a twentieth of the run."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _stage_starts(run: RunData) -> list[int]:
    pairs = zip(run.train, run.train[1:], strict=False)
    return [b["step"] for a, b in pairs if a.get("stage") != b.get("stage")]
