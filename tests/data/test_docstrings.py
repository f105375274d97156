"""Docstrings of installed packages: found without importing, prose only, split by package."""

from __future__ import annotations

import sys

import pytest

from adapt.components import SourceChoice
from adapt.config.decode import decode
from adapt.data.sources.docstrings import required
from adapt.errors import UserError

PROSE = """Return the reading of the instrument after the correction was applied.

    The correction is a sum of two parts. The first one depends on the temperature of the room, and the second
    one on the age of the instrument. Both are measured once a day, and kept in a small table that the user can
    read and change. Nothing is applied when the table is empty.
    """
TABLE = """Values of all the constants, in the order in which the standard document lists every one of them.

    ========  =======  ========
    name      value    unit
    ========  =======  ========
    alpha     1.0      metre
    beta      2.0      second
    gamma     3.0      kelvin
    ========  =======  ========
    >>> constant("alpha")
    1.0
    >>> constant("beta")
    2.0
    """


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Three fake distributions: `prose-one` and `prose-two` (required by the first), `prose-three`."""

    def install(name, version, files, requires=()):
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n"
        info.joinpath("METADATA").write_text(head + "".join(f"Requires-Dist: {r}\n" for r in requires))
        for file, text in files.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
        info.joinpath("RECORD").write_text("".join(f"{file},,\n" for file in files))

    code = f'''\
"""{PROSE}"""
raise RuntimeError("this module must never be imported")
class Thing:
    def long(self):
        """{PROSE.replace("instrument", "thing")}"""
    def short(self):
        """Return it."""
    def table(self):
        """{TABLE}"""
add_newdoc("one.core", "compiled", """{PROSE.replace("instrument", "array")}""")
'''
    install(
        "prose_one",
        "1.0",
        {
            "prose_one/__init__.py": code,
            "prose_one/broken.py": f'"""{PROSE}"""\ndef (',
            "prose_one/generated.py": f'# Auto-generated, do not edit\n"""{PROSE}"""',
            "prose_one/tests/test_x.py": f'"""{PROSE}"""',
        },
        ["prose-two>=1; python_version > '3'", "never-there", "prose-three; extra == 'more'"],
    )
    install("prose-two", "2.0", {"prose_two.py": f'"""{PROSE.replace("instrument", "clock")}"""'})
    install("prose-three", "3.0", {"prose_three.py": f'"""{PROSE.replace("instrument", "scale")}"""'})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


ALL = ["prose-one", "prose.two", "prose-three"]


def docstrings(**config):
    return decode({"name": "docstrings", "packages": ALL, **config}, SourceChoice).build()


def test_prose_is_kept_with_its_origin(installed):
    documents = list(docstrings(packages=["prose-one"]).documents())
    assert [d.id for d in documents] == [
        "prose-one:prose_one",
        "prose-one:prose_one.Thing.long",
        "prose-one:prose_one.one.core.compiled",
    ]
    text = documents[1].text
    assert text.startswith("Return the reading of the thing after")
    assert "\nThe correction is" in text  # indentation is gone
    assert documents[1].meta == {
        "part": "prose-one",
        "package": "prose-one",
        "version": "1.0",
        "licence": "MIT",
        "module": "prose_one",
        "qualname": "Thing.long",
    }


@pytest.mark.parametrize("held_out", [["prose_two"], 0.5])
def test_whole_packages_are_held_out(installed, held_out):
    def packages(split):
        return {d.meta["package"] for d in docstrings(split=split, held_out=held_out).documents()}

    assert packages("train") | packages("held-out") == packages("all") == {"prose-one", "prose-two", "prose-three"}
    assert not packages("train") & packages("held-out")
    assert packages("train")
    assert packages("held-out")


@pytest.mark.parametrize("share", [5, -0.1, float("nan")])
def test_a_held_out_share_is_a_fraction(share):
    with pytest.raises(UserError, match="held_out=.* is a fraction"):
        docstrings(held_out=share)


def test_fingerprint_follows_versions_and_split(installed, tmp_path):
    prints = {docstrings(split=s, held_out=["prose-two"]).fingerprint() for s in ("train", "held-out", "all")}
    metadata = tmp_path / "prose_two-2.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("2.0", "2.1"))
    assert len(prints | {docstrings().fingerprint()}) == 4


def test_requirements_are_followed_through_markers(installed):
    assert required("prose-one") == ["prose-two"]
    assert {"numpy", "torch", "rich"} <= set(required())
    assert "adapt-lm" not in required()


def test_unknown_packages_are_named(installed):
    with pytest.raises(UserError, match=r"prose-on is not installed here. Did you mean 'prose-one'?"):
        docstrings(packages=["prose-on"])
    with pytest.raises(
        UserError, match=r"held_out names 'prose-tow', not one of the packages. Did you mean 'prose-two'?"
    ):
        docstrings(held_out=["prose-tow"])
    with pytest.raises(UserError, match="the split 'held-out' has no package"):
        docstrings(split="held-out", held_out=[])
