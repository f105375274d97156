"""Multiple choice made from held-out ATT&CK documents: which technique is described, what mitigates it.

Each question is made from one document of `source`, so a `source` that is held out of training makes questions that are.
Wrong answers come from techniques of the same tactic, the hardest to tell apart.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapt.components import SourceChoice, sources
from adapt.data.documents import BadRecord, Document
from adapt.data.noise import generator
from adapt.errors import UserError

VERSION = 1
"""Part of the fingerprint: raise it when the questions change."""
Kind = Literal["name", "mitigation"]


@dataclass(frozen=True, kw_only=True)
class AttackQuestionsConfig:
    source: SourceChoice
    """Documents that are asked about, with ATT&CK's facts in their meta (source `attack`, or a corpus with it): the
    held-out split of what is trained on."""
    distractors_from: SourceChoice | None = None
    """Documents whose names and mitigations may be wrong answers too, e.g. the training split; null: none."""
    kinds: tuple[Kind, ...] = ("name", "mitigation")
    """`name`: the description (without its name) -> the technique's name. `mitigation`: the name -> what mitigates it."""
    distractors: int = 3
    """Wrong answers of each question. Techniques without enough others of their tactic are not asked about."""
    description: int = 600
    """Characters of a description at most, cut at the end of a sentence."""
    seed: int = 0
    """Chooses the wrong answers."""

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError("kinds=[] asks nothing; give name, mitigation, or both")
        for key in ("distractors", "description"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be 1 or more")


@dataclass(frozen=True)
class Technique:
    attack_id: str
    name: str
    tactics: frozenset[str]
    description: str
    parent: str | None
    mitigations: tuple[tuple[str, str], ...]
    """(id of the mitigation, what it advises against this technique)."""

    @staticmethod
    def of(document: Document) -> Technique | None:
        """None of documents that are no techniques."""
        meta = document.meta
        if meta.get("kind") != "technique" or not meta.get("name") or not meta.get("tactics"):
            return None
        # Advice that names its technique, or says that there is none, gives itself away among other techniques' advice.
        advice = [
            (m.get("attack_id", ""), without(meta["name"], m.get("text", ""))) for m in meta.get("mitigations") or ()
        ]
        advice = [(i, text) for i, text in advice if "cannot be easily mitigated" not in text]
        return Technique(
            attack_id=str(meta.get("attack_id") or document.id),
            name=meta["name"],
            tactics=frozenset(meta["tactics"]),
            description=meta.get("description") or "",
            parent=meta.get("parent"),
            mitigations=tuple((i, text) for i, text in advice if text),
        )

    def related(self, other: Technique) -> bool:
        """A technique and its sub-technique may both be right."""
        return self.attack_id == other.attack_id or self.attack_id == other.parent or self.parent == other.attack_id


class AttackQuestions:
    def __init__(self, config: AttackQuestionsConfig):
        self.config = config
        self.asked = config.source.build()
        self.others = config.distractors_from.build() if config.distractors_from else None
        self.label, self.where, self.licence = "attack-questions", self.asked.where, self.asked.licence

    @property
    def inner(self) -> list[Any]:
        return [s for s in (self.asked, self.others) if s is not None]

    @property
    def remote(self) -> bool:
        return any(getattr(source, "remote", False) for source in self.inner)

    def use_cache(self, folder: Path) -> None:
        for source in self.inner:
            if hasattr(source, "use_cache"):
                source.use_cache(folder)

    def fingerprint(self) -> str:
        facts = (VERSION, self.config, [source.fingerprint() for source in self.inner])
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        asked = techniques(self.asked)
        if not asked:
            raise UserError(
                f"{self.where}: no document in it has the facts of an ATT&CK technique in its meta (kind, name, "
                f"tactics, description); questions are made from the source `attack`, or a corpus that has it"
            )
        known = {t.attack_id for t in asked}
        pool = asked + [t for t in (techniques(self.others) if self.others else []) if t.attack_id not in known]
        for technique in asked:
            number = int(hashlib.sha256(technique.attack_id.encode()).hexdigest()[:12], 16)
            near = [t for t in pool if t.tactics & technique.tactics and not t.related(technique)]
            for index, kind in enumerate(self.config.kinds):
                rng = generator(self.config.seed, number, index)
                found = QUESTIONS[kind](technique, near, self.config, rng)
                if found is not None and not mentions(found[0], found[1]):
                    prompt, answer, wrong = found
                    facts = {"part": kind, "attack_id": technique.attack_id, "distractors": wrong}
                    yield Document(
                        id=f"attack:{technique.attack_id}:{kind}", prompt=prompt, response=answer, meta=facts
                    )


Found = tuple[str, str, list[str]]
"""Prompt, right answer, wrong answers."""


def ask_name(technique: Technique, near: list[Technique], config: AttackQuestionsConfig, rng: Any) -> Found | None:
    description = without(technique.name, shortened(technique.description, config.description))
    description = re.sub(rf"\b{re.escape(technique.attack_id)}\b(?!\.\d)", "this technique", description)
    # A name that the description mentions would be another right answer, or no temptation at all.
    names = dict.fromkeys(t.name for t in near if not mentions(description, t.name) and t.name != technique.name)
    wrong = choose(list(names), config.distractors, rng)
    if wrong is None or not description:
        return None
    return f"Description of an ATT&CK technique: {description}\nName of the technique:\n", technique.name, wrong


def ask_mitigation(
    technique: Technique, near: list[Technique], config: AttackQuestionsConfig, rng: Any
) -> Found | None:
    if not technique.mitigations:
        return None
    own = {attack_id for attack_id, _ in technique.mitigations}
    answer = technique.mitigations[int(rng.integers(len(technique.mitigations)))][1]
    texts = {text: i for t in near for i, text in t.mitigations if i not in own}
    texts = {text: i for text, i in texts.items() if text not in {text for _, text in technique.mitigations}}
    wrong = choose(list(texts), config.distractors, rng)
    if wrong is None:
        return None
    return f"How can the ATT&CK technique {technique.name} be mitigated?\n", answer, wrong


QUESTIONS = {"name": ask_name, "mitigation": ask_mitigation}


def techniques(source: Any) -> list[Technique]:
    documents = (d for d in source.documents() if not isinstance(d, BadRecord))
    return [t for t in map(Technique.of, documents) if t is not None]


def choose(options: list[str], count: int, rng: Any) -> list[str] | None:
    """`count` of them; None where there are fewer."""
    if len(options) < count:
        return None
    return [options[int(i)] for i in rng.choice(len(options), size=count, replace=False)]


def without(name: str, text: str) -> str:
    """The text with every mention of the name (in any case, in the plural) put into other words."""
    return re.sub(rf"{_flexible(name)}(?:e?s)?", "this technique", text, flags=re.IGNORECASE)


def mentions(text: str, name: str) -> bool:
    return re.search(_flexible(name), text, flags=re.IGNORECASE) is not None


def _flexible(name: str) -> str:
    """The name however its words are joined: `Pass the Hash`, `pass-the-hash`."""
    return r"[\s\-_]*".join(re.escape(word) for word in re.split(r"[\s\-_]+", name) if word)


def shortened(text: str, characters: int) -> str:
    """Whole sentences at the beginning of a text, at least one."""
    sentences = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+", text.strip())
    kept = sentences[:1]
    for sentence in sentences[1:]:
        if len(" ".join([*kept, sentence])) > characters:
            break
        kept.append(sentence)
    return " ".join(kept)


@sources.register("attack_questions")
def attack_questions(config: AttackQuestionsConfig) -> AttackQuestions:
    return AttackQuestions(config)
