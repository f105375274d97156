"""What the user sees of a running fit: a live display on a terminal, one line per log step anywhere else."""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from adapt.console import printable

SKIP = {"step", "stage", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds", "time", "epoch"}
SHORT = {"block_size": "b"}
BARS = "▁▂▃▄▅▆▇█"

_live: weakref.WeakSet[Progress] = weakref.WeakSet()


def stop_all() -> None:
    """Give the terminal back, whatever happened."""
    for progress in list(_live):
        progress.finish()


class Progress:
    """`header` first, then `update` at every log step; `note` for a line in between; `finish` at the end."""

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        tokens_per_step: int = 0,
        offset: int = 0,
        console: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Steps are counted within the stage; `offset` is how many the stages before it made, so that steps given to
        `update` may be those of the whole run."""
        from rich.console import Console

        self.console = console or Console(highlight=False)
        self.total, self.offset, self.tokens_per_step = total_steps, offset, tokens_per_step
        self.clock = clock
        self.pace = Pace(start_step, clock())
        self.step, self.values = start_step, {}
        self.losses: deque[float] = deque(maxlen=40)
        self.live: Any = None

    def header(self, facts: Mapping[str, Any]) -> None:
        from rich.table import Table
        from rich.text import Text

        if self.console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for key, value in facts.items():
                table.add_row(Text(str(key), style="bold"), Text(printable(str(value))))
            self.console.print(table)
        else:
            for key, value in facts.items():
                self._print(f"{key}: {value}")
        self.pace = Pace(self.step, self.clock())

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        self.step, self.values = step - self.offset, dict(values)
        self.pace.tick(self.step, self.clock())
        if isinstance(values.get("loss"), float | int):
            self.losses.append(float(values["loss"]))
        if self.console.is_terminal:
            self._draw()
        else:
            self._print(notebook_line(self.step, self.total, values, self.eta()))

    def leave_out(self, seconds: float) -> None:
        """Time since the last update that went into something else than steps."""
        self.pace.now += seconds

    def note(self, text: str) -> None:
        self._print(text)

    def finish(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        _live.discard(self)

    def eta(self) -> float | None:
        """Seconds to go, by the recent pace."""
        return None if self.pace.seconds is None else self.pace.seconds * max(0, self.total - self.step)

    def _print(self, text: str) -> None:
        self.console.print(printable(text), soft_wrap=True, markup=False, highlight=False)

    def _draw(self) -> None:
        from rich.live import Live

        if self.live is None:
            self.live = Live(console=self.console, refresh_per_second=4, transient=False)
            self.live.start()
            _live.add(self)
        self.live.update(self._panel(), refresh=True)

    def _panel(self):
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        top = Table.grid(padding=(0, 2), expand=False)
        share = f"{100 * self.step / self.total:.0f} %" if self.total else ""
        top.add_row(
            ProgressBar(total=max(1, self.total), completed=self.step, width=30),
            Text(f"step {self.step:,}/{self.total:,}", style="bold"),
            share,
            f"{self.total * self.tokens_per_step:,} tokens in all" if self.tokens_per_step else "",
            "" if self.eta() is None else f"eta {duration(self.eta())}",
        )
        loss = Text.assemble((loss_text(self.values), "bold"), "  ", (sparkline(self.losses), "cyan"))
        return Group(top, loss, Text(" · ".join(figures(self.values)), style="dim"))


class Pace:
    """Seconds per step, a running mean that forgets old ones."""

    def __init__(self, step: int, now: float):
        self.step, self.now, self.seconds = step, now, None

    def tick(self, step: int, now: float) -> None:
        if step <= self.step:  # the first line, or a run that was set back
            self.step, self.now = step, now
            return
        latest = (now - self.now) / (step - self.step)
        self.seconds = latest if self.seconds is None else 0.8 * self.seconds + 0.2 * latest
        self.step, self.now = step, now


def notebook_line(step: int | None, total: int | None, values: Mapping[str, Any], eta: float | None = None) -> str:
    """`step 12/40 | tokens 24,576 | loss 3.214 (ar 2.53) | lr 1.0e-4 | grad 1.2 | 117 tok/s | b 4 | eta 5:32`"""
    parts = [f"step {step}/{total}" if total is not None else f"step {step}"]
    tokens, *rest = figures(values)
    parts += [tokens, loss_text(values), *rest] if tokens else [loss_text(values), *rest]
    return " | ".join([p for p in parts if p] + ([] if eta is None else [f"eta {duration(eta)}"]))


def loss_text(values: Mapping[str, Any]) -> str:
    terms = [(k.removeprefix("loss/"), v) for k, v in values.items() if k.startswith("loss/")]
    terms = [f"{name} {number(v)}" for name, v in terms if "/" not in name]  # others are details: one for each layer
    loss = f"loss {number(values['loss'])}" if "loss" in values else ""
    return f"{loss} ({' '.join(terms)})" if terms else loss


def figures(values: Mapping[str, Any]) -> list[str]:
    """Everything but the loss; the first is the token count (or empty)."""
    known = [f"tokens {values['tokens']:,}" if isinstance(values.get("tokens"), int) else ""]
    if values.get("lr") is not None:
        mantissa, _, exponent = f"{values['lr']:.1e}".partition("e")
        known.append(f"lr {mantissa}e{int(exponent)}" if exponent else f"lr {number(values['lr'])}")
    if "grad_norm" in values:
        known.append(f"grad {number(values['grad_norm'])}")
    if values.get("tokens_per_s") is not None:
        known.append(f"{values['tokens_per_s']:,.0f} tok/s")
    for key, value in values.items():
        if key not in SKIP and not key.startswith(("loss/", "eval/")) and isinstance(value, int | float):
            known.append(f"{SHORT.get(key, key.replace('_', ' '))} {number(value)}")
    return known


def number(value: Any) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def sparkline(values) -> str:
    values = [v for v in values if math.isfinite(v)]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((v - low) * scale)] for v in values)
