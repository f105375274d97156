"""Debian packages as sources: fetched without installing, read without unpacking, kept in the cache."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from adapt.components import SourceChoice
from adapt.config.decode import decode
from adapt.data import debian_archive, debs
from adapt.data.documents import BadRecord
from adapt.errors import NotReachable, UserError
from tests.data.packages import link, make_archive, make_deb, make_tar

PAGE = b".TH EXAMPLE 3\n.SH NAME\nexample - shows\n"
MEMBERS = {
    "usr/share/man/man3/example.3ssl.gz": gzip.compress(PAGE),
    "usr/share/doc/made-up/index.html": b"<p>One</p>",
    "usr/share/doc/made-up/notes.txt.gz": gzip.compress("Zwölf\r\nNotizen".encode()),
    "usr/share/doc/made-up/picture.png": b"\x89PNG",
    "usr/share/doc/made-up/copyright": b"License: MIT",
    "usr/share/doc/made-up/empty.txt": b" \n",
}


def source(tmp_path, archive=None, **options):
    choice = {"name": "debian", "package": "made-up", "suite": "bookworm", "archive": archive, **options}
    made = decode(choice, SourceChoice).build()
    made.use_cache(tmp_path / "cache")
    return made


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path / "archive", make_deb(tmp_path, "made-up", "1.2-3", MEMBERS))


def test_the_documents_of_a_package(tmp_path, archive):
    read = list(source(tmp_path, archive, licence="MIT").documents())
    assert [(d.meta["media"], d.text) for d in read] == [
        ("man", PAGE.decode()),
        ("html", "<p>One</p>"),
        ("text", "Zwölf\nNotizen"),
    ]
    first = read[0]
    assert first.id == "made-up:usr/share/man/man3/example.3ssl.gz"
    assert first.meta["part"] == "made-up"
    assert (first.meta["version"], first.meta["licence"]) == ("1.2-3", "MIT")
    assert len(first.meta["sha256"]) == 64


def test_patterns_choose_files(tmp_path, archive):
    some = source(tmp_path, archive, files=["usr/share/doc/*"], exclude=["*.html"])
    assert [d.meta["file"] for d in some.documents()] == ["usr/share/doc/made-up/notes.txt.gz"]
    with pytest.raises(
        UserError, match=r"no readable file matches opt/\*. It has readable files in: usr/share/doc/made-up"
    ):
        list(source(tmp_path, archive, files=["opt/*"]).documents())


def test_a_package_is_fetched_once_and_then_read_without_the_network(tmp_path, archive):
    first = source(tmp_path, archive)
    first.check()
    assert not (tmp_path / "cache").exists()  # validation fetches nothing
    texts, fingerprint = [d.text for d in first.documents()], first.fingerprint()
    shutil.rmtree(tmp_path / "archive")
    again = source(tmp_path, archive)
    again.check()
    assert [d.text for d in again.documents()] == texts
    assert again.fingerprint() == fingerprint
    with pytest.raises(NotReachable, match="Debian package made-up is not in the cache and could not be fetched"):
        source(tmp_path / "elsewhere", archive).fingerprint()


def test_the_fingerprint_follows_package_and_options(tmp_path):
    prints = set()
    for number, (version, members) in enumerate(
        [("1", MEMBERS), ("2", MEMBERS), ("2", MEMBERS | {"usr/share/doc/x.md": b"x"})]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        archive = make_archive(place / "archive", make_deb(place, "made-up", version, members))
        prints |= {source(place, archive).fingerprint(), source(place, archive, exclude=["*.md"]).fingerprint()}
    assert len(prints) == 6


def test_links_and_devices_and_paths_out_of_the_package_lead_nowhere(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    members = {
        "usr/share/doc/made-up/a.txt": b"plain",
        "1": link("./usr/share/doc/made-up/link.txt", str(secret)),
        "2": link("./usr/share/doc/made-up/hard.txt", "../../secret.txt", tarfile.LNKTYPE),
        "3": link("./usr/share/doc/made-up/fifo.txt", "", tarfile.FIFOTYPE),
        "../../usr/share/doc/up.txt": b"above",
        "/usr/share/doc/root.txt": b"absolute",
    }
    archive = make_archive(tmp_path / "archive", make_deb(tmp_path, "made-up", "1", members))
    before = sorted(p for p in tmp_path.rglob("*.txt") if "cache" not in p.parts)
    read = list(source(tmp_path, archive, files=["*"]).documents())
    assert {d.text for d in read} == {"plain", "above", "absolute"}  # as texts: they are never written anywhere
    assert sorted(p for p in tmp_path.rglob("*.txt") if "cache" not in p.parts) == before


def test_large_files_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(debs, "MAX_FILE", 10)
    deb = make_deb(tmp_path, "made-up", "1", {"usr/share/doc/a.txt": b"short", "usr/share/doc/b.txt": b"x" * 11})
    assert list(debs.files(deb, ("*",))) == [("usr/share/doc/a.txt", b"short")]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
def test_a_small_file_that_unpacks_to_a_large_one_is_passed_over(suffix, pack, tmp_path, monkeypatch):
    monkeypatch.setattr(debs, "MAX_FILE", 1000)
    members = {f"usr/share/doc/a.txt{suffix}": pack(b"short"), f"usr/share/doc/b.txt{suffix}": pack(b"x" * 100_000)}
    deb = make_deb(tmp_path, "made-up", "1", members)
    assert list(debs.files(deb, ("*",))) == [(f"usr/share/doc/a.txt{suffix}", b"short")]


@pytest.mark.parametrize("packing", ["xz", "gz", "bz2"])
def test_every_packing_that_python_knows(tmp_path, packing):
    deb = make_deb(tmp_path, "made-up", "1", {"usr/share/doc/a.txt": b"short"}, packing)
    assert list(debs.files(deb, ("*",))) == [("usr/share/doc/a.txt", b"short")]
    assert debs.control(deb) == {"Package": "made-up", "Version": "1", "Architecture": "all", "Description": "made up"}


def test_zstd_is_read_by_dpkg_deb_or_refused(tmp_path, monkeypatch):
    members = {"usr/share/doc/a.txt": b"short"}
    plain = tmp_path / "plain.tar"
    plain.write_bytes(make_tar(members, ""))
    deb = make_deb(tmp_path, "made-up", "1", members, "gz")
    deb.write_bytes(deb.read_bytes().replace(b"data.tar.gz ", b"data.tar.zst"))
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: popen(["cat", str(plain)], **more))
    assert list(debs.files(deb, ("*",))) == [("usr/share/doc/a.txt", b"short")]

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "Popen", missing)
    with pytest.raises(UserError, match="packed with zstd, which needs dpkg-deb"):
        list(debs.files(deb, ("*",)))


@pytest.mark.parametrize("contents", [b"", b"!<arch>\n", b"<html>", b"!<arch>\n" + b"x" * 200])
def test_damaged_packages_are_named(tmp_path, contents):
    deb = tmp_path / "x.deb"
    deb.write_bytes(contents)
    with pytest.raises(UserError, match=r"x.deb: (has no data.tar|cannot be read)"):
        list(debs.files(deb, ("*",)))


def test_cut_packages_are_named(tmp_path):
    deb = make_deb(tmp_path, "made-up", "1", {"usr/share/doc/a.txt": bytes(range(256)) * 99})
    deb.write_bytes(deb.read_bytes()[:-200])
    with pytest.raises(UserError, match="x?.deb: cannot be read"):
        list(debs.files(deb, ("*",)))


def test_another_package_than_the_index_states_is_not_opened(tmp_path):
    archive = make_archive(tmp_path / "archive", make_deb(tmp_path, "made-up", "1", MEMBERS), sha="0" * 64)
    with pytest.raises(UserError, match="the archive's index states 000"):
        source(tmp_path, archive).fingerprint()
    assert not list((tmp_path / "cache").rglob("*.deb"))


def test_a_stated_hash_must_be_met(tmp_path, archive):
    actual = next(iter(source(tmp_path, archive).documents())).meta["sha256"]
    assert list(source(tmp_path, archive, sha256=actual.upper()).documents())
    with pytest.raises(UserError, match="not 1111"):
        list(source(tmp_path, archive, sha256="1" * 64).documents())


def test_a_version_that_is_not_offered_is_told_with_the_one_that_is(tmp_path, archive):
    with pytest.raises(NotReachable, match=r"has no made-up=9 in bookworm: it has 1.2-3; remove `version`"):
        source(tmp_path, archive, version="9").fingerprint()
    assert list(source(tmp_path, archive, version="1.2-3").documents())


@pytest.mark.parametrize("options", [{"package": "../x"}, {"package": "a b"}, {"version": "-o=x"}, {"suite": "../.."}])
def test_names_are_checked(tmp_path, options):
    with pytest.raises(UserError, match="is no"):
        source(tmp_path, **options)


def test_undecodable_files_are_bad_records(tmp_path):
    members = {
        "usr/share/doc/a.html": '<meta charset="iso-8859-1"><p>Grüße'.encode("latin-1"),
        "usr/share/doc/b.txt": "Grüße".encode("latin-1"),
    }
    archive = make_archive(tmp_path / "archive", make_deb(tmp_path, "made-up", "1", members))
    first, second = source(tmp_path, archive).documents()
    assert "Grüße" in first.text
    assert isinstance(second, BadRecord)
    assert second.where == "made-up:usr/share/doc/b.txt"


class FakeApt:
    """An apt-get that offers one package, and what it was asked."""

    def __init__(self, monkeypatch, tmp_path, deb, codename="bookworm"):
        self.deb, self.asked = deb, []
        (tmp_path / "os-release").write_text(f'VERSION_CODENAME="{codename}"\n')
        monkeypatch.setattr(debian_archive, "OS_RELEASE", tmp_path / "os-release")
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command, cwd, **_):
        self.asked.append(command)
        if command[-1] == "update":
            return subprocess.CompletedProcess(command, 0, "", "")
        if self.deb is None:
            return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package made-up\n")
        (Path(cwd) / self.deb.name).write_bytes(self.deb.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


def test_apt_downloads_with_private_folders(tmp_path, monkeypatch):
    apt = FakeApt(monkeypatch, tmp_path, make_deb(tmp_path, "made-up", "1", MEMBERS))
    assert len(list(source(tmp_path).documents())) == 3
    update, download = apt.asked
    for command in (update, download):
        folders = [part.partition("=")[2] for part in command if part.startswith("Dir::")]
        assert len(folders) == 3
        assert all(Path(folder).is_relative_to(tmp_path / "cache") for folder in folders)
    assert download[-2:] == ["download", "made-up"]
    list(source(tmp_path, version="1").documents())
    assert apt.asked[-1][-2:] == ["download", "made-up=1"]
    assert len(apt.asked) == 3  # the lists are still fresh


def test_what_apt_lacks_is_looked_for_in_the_archive(tmp_path, monkeypatch, archive):
    FakeApt(monkeypatch, tmp_path, None)
    monkeypatch.setattr(debian_archive, "ARCHIVE", archive)
    assert len(list(source(tmp_path).documents())) == 3
    monkeypatch.setattr(debian_archive, "ARCHIVE", (tmp_path / "nowhere").as_uri())
    with pytest.raises(NotReachable, match=r"E: Unable to locate package made-up; file://"):
        list(source(tmp_path / "elsewhere").documents())


def test_apt_of_another_release_is_not_asked(tmp_path, monkeypatch, archive):
    apt = FakeApt(monkeypatch, tmp_path, None, codename="noble")
    monkeypatch.setattr(debian_archive, "ARCHIVE", archive)
    assert len(list(source(tmp_path).documents())) == 3
    assert apt.asked == []
