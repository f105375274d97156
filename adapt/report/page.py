"""One self-contained HTML page of a run, or of several: every registered section that has something to say."""

from __future__ import annotations

from pathlib import Path

from adapt.components import sections
from adapt.errors import UserError
from adapt.registry import Entry, UnknownComponent
from adapt.report.data import COLOURS, RunData, read


def build(run: Path, compare: list[Path], out: Path | None) -> Path:
    """Write the page of `run` (others drawn over it) to `out`, by default `report.html` in the run folder.

    A section's factory takes its config, whose `order` and `title` place it, and returns
    `html(runs: list[RunData]) -> str | None`; null leaves the section out.
    """
    import jinja2

    runs = _read([Path(run), *map(Path, compare)])
    parts = []
    for entry in map(_section, sections.names()):
        config = entry.config_type()
        html = entry.factory(config)(runs)
        if html:
            parts.append((getattr(config, "order", 1000), getattr(config, "title", entry.name), entry.name, html))
    parts.sort()
    template = jinja2.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), autoescape=True)
    page = template.render(runs=runs, parts=[{"title": t, "name": n, "html": html} for _, t, n, html in parts])
    target = Path(out) if out else runs[0].path / "report.html"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report {target} cannot be written: {error.strerror}") from None
    return target


def _section(name: str) -> Entry:
    try:
        return sections[name]
    except UnknownComponent as error:  # of an installed package
        raise UserError(str(error)) from None


def _read(paths: list[Path]) -> list[RunData]:
    wrong = [p for p in paths if not ((p / "config.yaml").is_file() or (p / "metrics.jsonl").is_file())]
    if wrong:
        raise UserError(f"{wrong[0]} is not a run folder: there is neither config.yaml nor metrics.jsonl in it")
    names = [p.resolve().name for p in paths]
    unique = [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]
    return [read(p, n, COLOURS[i % len(COLOURS)]) for i, (p, n) in enumerate(zip(paths, unique, strict=True))]
