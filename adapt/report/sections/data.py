"""Where the text came from, and how much of it is left after cleaning."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from adapt.components import sections
from adapt.report.data import RunData, is_number

COLUMNS = {"documents": "documents", "words": "words", "bytes": "bytes", "tokens": "tokens"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    order: int = 50
    """Place on the page; lower comes first."""
    title: str = "Data"
    """Heading."""


@sections.register("data")
def data(config: DataConfig):
    def html(runs: list[RunData]) -> str | None:
        tables, seen = [], []
        for run in runs:
            if run.manifest and run.manifest not in seen:
                seen.append(run.manifest)
                title = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
                tables.append(title + _table(run.manifest))
        return "".join(tables) or None

    return html


def _table(manifest: dict[str, Any]) -> str:
    rows = [("train", m) for m in manifest.get("train") or []]
    rows += [("held out", m) for m in (manifest.get("eval") or {}).values()]
    head = "".join(f'<th class="n">{name}</th>' for name in COLUMNS.values())
    body = "".join(
        f"<tr><td>{part}</td><td>{_text(m.get('label'))}</td>{''.join(_cell(m.get(c)) for c in COLUMNS)}"
        f"<td>{_text(m.get('licence')) or 'not stated'}</td><td>{_dropped(m)}</td></tr>"
        for part, m in rows
    )
    stages = "".join(_stages(m) for _, m in rows)
    print_ = manifest.get("fingerprint")
    foot = f'<p class="quiet">fingerprint {_text(str(print_)[:16])}</p>' if print_ else ""
    return (
        f'<div class="scroll"><table><thead><tr><th></th><th>data set</th>{head}<th>licence</th><th>left out</th></tr>'
        f"</thead><tbody>{body}</tbody></table></div>{stages}{foot}"
    )


def _stages(manifest: dict[str, Any]) -> str:
    """Documents, words and bytes after every step of preparation, folded away."""
    steps = [s for s in manifest.get("steps") or [] if "bytes_out" in s]
    if not steps:
        return ""
    rows = [(s["step"], s["out"], s["words_out"], s["bytes_out"], s.get("changed", "")) for s in steps]
    body = "".join(f"<tr><td>{_text(name)}</td>{''.join(map(_cell, cells))}</tr>" for name, *cells in rows)
    head = "".join(f'<th class="n">{name}</th>' for name in ("documents", "words", "bytes", "changed"))
    return (
        f"<details><summary>{_text(manifest.get('label'))}: after every step</summary>"
        f'<div class="scroll"><table><thead><tr><th>step</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "</details>"
    )


def _dropped(manifest: dict[str, Any]) -> str:
    found = [
        f"{count:,} {why}"
        for step in manifest.get("steps") or []
        for why, count in (step.get("dropped") or {}).items()
        if count
    ]
    for key, why in (
        ("pairs_too_long", "pairs longer than a row"),
        ("prompts_cut", "pairs without their prompt's beginning"),
    ):
        found += [f"{manifest[key]:,} {why}"] if manifest.get(key) else []
    return _text(", ".join(found))


def _cell(value: Any) -> str:
    return f'<td class="n">{value:,}</td>' if is_number(value) else f"<td>{_text(value)}</td>"


def _text(value: Any) -> str:
    return escape(str(value if value is not None else ""))
