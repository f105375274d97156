"""Extending without a fork: entry points of installed packages, and what a component declares before it is built."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from adapt.components import ObjectiveChoice, ScheduleChoice, schedules, sections
from adapt.config import decode
from adapt.errors import UserError
from adapt.report import build

MODULE = """
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class FlatConfig:
    height: float = 0.5

def flat(config: FlatConfig):
    return lambda step, total: config.height

@dataclass(frozen=True, kw_only=True)
class HelloConfig:
    order: int = 1
    title: str = "Hello"

def hello(config: HelloConfig):
    return lambda runs: "<p>from an installed package</p>"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed distribution that offers a schedule, a report section and something broken."""
    (tmp_path / "some_extension.py").write_text(MODULE)
    info = tmp_path / "some_extension-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: some-extension\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[adapt.schedule]\nflat = some_extension:flat\nbroken = some_extension:nowhere\n"
        "[adapt.section]\nhello = some_extension:hello\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("some_extension", None)


def test_entry_points_are_found_by_name_and_listed(package):
    assert decode({"name": "flat", "height": 0.25}, ScheduleChoice).build()(3, 10) == 0.25
    assert "flat" in schedules.names()
    assert "hello" in sections.names()
    with pytest.raises(UserError, match="Did you mean 'flat'"):
        decode("flad", ScheduleChoice)
    with pytest.raises(UserError, match="cannot import schedule 'broken'"):
        decode("broken", ScheduleChoice)


def test_report_sections_of_installed_packages_appear(package, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    page = build(run, [], None).read_text()
    assert "from an installed package" in page
    assert "Hello" in page


@dataclass(frozen=True, kw_only=True)
class PupilConfig:
    pass


class Pupil:
    needs_teacher = True


def pupil(config: PupilConfig, facts) -> Pupil:
    return Pupil()


def test_what_an_objective_declares_is_known_without_building_it():
    taught = decode("tests.test_registry.pupil", ObjectiveChoice)
    assert taught.declares("needs_teacher")
    assert not taught.declares("pairs")
    assert not decode("next_token", ObjectiveChoice).declares("needs_teacher")
