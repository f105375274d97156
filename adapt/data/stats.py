"""The manifest of prepared data as tables that fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 110
"""Columns from which numbers are written in full."""


def tables(labelled: Iterable[tuple[str, dict[str, Any]]], width: int) -> list[Table]:
    """(label, manifest) of each dataset -> sizes, origins, steps, malformed records (where there are any)."""
    from rich.table import Table

    def titled(title: str, first: str, *columns: str) -> Table:
        table = Table(title=title, title_justify="left", pad_edge=False)
        table.add_column(first, overflow="fold")
        for name in columns:
            text = name in TEXT
            table.add_column(name, justify="left" if text else "right", no_wrap=not text, overflow="fold")
        return table

    number = exact if width >= WIDE else short
    sizes = titled("Data", "dataset", "documents", "words", "bytes", "tokens", "learned", "bytes/token")
    origins = titled("Origins", "dataset", "source", "licence", "sha256")
    bad = titled("Malformed records", "where", "what")
    steps = []
    for label, m in labelled:
        counts = [number(m[k]) for k in ("documents", "words", "bytes", "tokens", "target_tokens")]
        sizes.add_row(label, *counts, f"{m['bytes'] / max(1, m['target_tokens']):.2f}")
        origins.add_row(label, m["where"], _licences(m), m["fingerprint"][:16])
        table = titled(
            f"Steps of {label}: documents, and what is left", "step", "in", "out", "changed", "bytes", "words"
        )
        for step in m["steps"]:
            changed = number(step["changed"]) if "changed" in step else ""
            numbers = [number(step[k]) for k in ("in", "out")]
            left = [number(step[k]) for k in ("bytes_out", "words_out")]
            table.add_row(step["step"].rpartition(".")[2], *numbers, changed, *left)
            for why, count in step["dropped"].items():
                table.add_row(f"- {number(count)} {why}", style="dim")
        steps.append(table)
        for record in m["bad_lines"]["listed"]:
            bad.add_row(record["where"], record["what"])
    return [sizes, origins, *steps, *([bad] if bad.row_count else [])]


TEXT = {"source", "licence", "sha256", "what"}


def _licences(manifest: dict[str, Any]) -> str:
    """As stated for the dataset, and as counted from its documents."""
    counted = [f"{name} ({count:,d})" for name, count in manifest["licences"].items()]
    stated = manifest["licence"]
    lines = [stated] if stated else ([] if counted else ["not stated"])
    encodings = [f"{count:,d} {name}" for name, count in manifest.get("encodings", {}).items()]
    return "\n".join([*lines, *counted[:5], *(["..."] if len(counted) > 5 else []), *_decoded(encodings)])


def _decoded(encodings: list[str]) -> list[str]:
    return [f"decoded: {', '.join(encodings)}"] if encodings else []


def exact(number: int) -> str:
    return f"{number:,d}"


def short(number: int) -> str:
    """At most seven characters: `12,345`, `1.23 M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{number:,d}"
