"""Cleaning steps for tests, chosen by their dotted path; and a source and a suite of the same kind."""

from __future__ import annotations

import dataclasses
import os
import signal
from array import array
from dataclasses import dataclass

from adapt.components import CleanerChoice, SourceChoice
from adapt.data.cleaning.base import map_strings
from adapt.data.dedup import text_hash
from adapt.data.documents import Document
from adapt.data.sources.jsonl import JsonlSource
from adapt.data.sources.jsonl import jsonl as jsonl_source


@dataclass(frozen=True, kw_only=True)
class MinWordsConfig:
    words: int = 3


class MinWords:
    sequential = False

    def __init__(self, config: MinWordsConfig):
        self.words = config.words

    def __call__(self, document: Document) -> Document | str:
        count = sum(len(s.split()) for s in document.strings())
        return document if count >= self.words else f"fewer than {self.words} words"


def min_words(config: MinWordsConfig) -> MinWords:
    return MinWords(config)


@dataclass(frozen=True, kw_only=True)
class StripConfig:
    what: str = "<b>"


class Strip:
    def __init__(self, config: StripConfig):
        self.what = config.what

    def __call__(self, document: Document) -> Document:
        return map_strings(document, lambda text: text.replace(self.what, ""))


def strip(config: StripConfig) -> Strip:
    return Strip(config)


@dataclass(frozen=True, kw_only=True)
class SeenLinesConfig:
    pass


class SeenLines:
    """Takes out every line that an earlier document had."""

    sequential = True

    def __init__(self):
        self.memory = array("Q")
        self._seen: set[int] = set()

    def restore(self, memory: array) -> None:
        self.memory.extend(memory)
        self._seen.update(memory)

    def __call__(self, document: Document) -> Document | str:
        lines = document.text.split("\n")
        new = [line for line in lines if text_hash(line) not in self._seen]
        for line in new:
            self.memory.append(text_hash(line))
            self._seen.add(text_hash(line))
        return document if len(new) == len(lines) else dataclasses.replace(document, text="\n".join(new))


def seen_lines(config: SeenLinesConfig) -> SeenLines:
    return SeenLines()


@dataclass(frozen=True, kw_only=True)
class DieConfig:
    how: str = "kill"


class Die:
    def __init__(self, config: DieConfig):
        self.how = config.how

    def __call__(self, document: Document) -> Document:
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no step can do this")


def die(config: DieConfig) -> Die:
    return Die(config)


@dataclass(frozen=True, kw_only=True)
class CleanedConfig:
    path: str


def cleaned(config: CleanedConfig) -> JsonlSource:
    """A source that brings a step of its own."""
    from adapt.data.sources.jsonl import JsonlConfig

    source = jsonl_source(JsonlConfig(path=config.path))
    source.clean = (CleanerChoice("tests.data.steps.strip", StripConfig()),)
    return source


@dataclass(frozen=True, kw_only=True)
class QuizConfig:
    source: SourceChoice


def quiz(config: QuizConfig):
    """A suite that asks what is in a source of its own."""
    return lambda context: {}
