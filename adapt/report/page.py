"""One self-contained HTML page of a run, or of several: every registered section that has something to say."""

from __future__ import annotations

from pathlib import Path

import yaml

from adapt.components import sections
from adapt.config.text import read_yaml
from adapt.console import printable
from adapt.errors import UserError
from adapt.registry import Entry, UnknownComponent
from adapt.report.data import COLOURS, RunData, read
from adapt.runfolder import ARMS, COMPARISON


def build(run: Path, compare: list[Path], out: Path | None) -> Path:
    """Write the page of `run` (others drawn over it) to `out`, by default `report.html` in the run folder; of a folder
    of arms, the page of its runs, by default `comparison.html` in it.

    A section's factory takes its config, whose `order` and `title` place it, and returns
    `html(runs: list[RunData]) -> str | None`; null leaves the section out.
    """
    import jinja2

    run = Path(run)
    arms = [] if _is_run(run) else _arms_in(run)
    runs = _read([*(arms or [run]), *map(Path, compare)])
    parts = []
    for entry in map(_section, sections.names()):
        config = entry.config_type()
        html = entry.factory(config)(runs)
        if html:
            parts.append((getattr(config, "order", 1000), getattr(config, "title", entry.name), entry.name, html))
    parts.sort()
    template = jinja2.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), autoescape=True)
    page = template.render(
        title=run.resolve().name if arms else None,
        runs=runs,
        parts=[{"title": t, "name": n, "html": html} for _, t, n, html in parts],
    )
    target = Path(out) if out else run / (COMPARISON if arms else "report.html")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(printable(page), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report {target} cannot be written: {error.strerror}") from None
    return target


def _section(name: str) -> Entry:
    try:
        return sections[name]
    except UnknownComponent as error:  # of an installed package
        raise UserError(str(error)) from None


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file()


def _arms_in(folder: Path) -> list[Path]:
    """The arms that have begun, in the recipe's order."""
    try:
        arms = read_yaml((folder / ARMS).read_text(encoding="utf-8")).get("arms") or {}
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []
    return [folder / name for name in arms if _is_run(folder / name)]


def _read(paths: list[Path]) -> list[RunData]:
    wrong = [p for p in paths if not _is_run(p)]
    if wrong:
        raise UserError(f"{wrong[0]} is not a run folder: there is neither config.yaml nor metrics.jsonl in it")
    names = [p.resolve().name for p in paths]
    unique = [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]
    return [read(p, n, COLOURS[i % len(COLOURS)]) for i, (p, n) in enumerate(zip(paths, unique, strict=True))]
