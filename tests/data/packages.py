"""Packages made up for tests: wheels and .debs, and the tools that would have fetched them."""

from __future__ import annotations

import io
import json
import lzma
import subprocess
import tarfile
import zipfile
from pathlib import Path

from adapt.wheels import sha256


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str | bytes], licence: str = "MIT") -> Path:
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('package code ran')")
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nLicense: {licence}\n\nText\n")
        for path, contents in files.items():
            archive.writestr(path, contents)
    return wheel


def spec(wheel: Path, scheme: str = "pypi:") -> str:
    name, version, *_ = wheel.name.split("-")
    return f"{scheme}{name}=={version}#sha256={sha256(wheel)}"


class FakePip:
    """A pip that hands out one wheel, and counts; `wheel = None`: there is no network."""

    def __init__(self, monkeypatch, wheel: Path | None):
        self.wheel, self.calls = wheel, []
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command, **_):
        self.calls.append(command)
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")
        folder = Path(command[command.index("--dest") + 1])
        (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


def stix(kind: str, number: int, attack_id: str, name: str, description: str, **more) -> dict:
    """A STIX object as ATT&CK's bundle writes it."""
    reference = {"source_name": "mitre-attack", "external_id": attack_id}
    return {"type": kind, "id": f"{kind}--{number}", "name": name, "description": description,
            "external_references": [reference], **more}  # fmt: skip


def relation(kind: str, source: str, target: str, description: str = "") -> dict:
    return {"type": "relationship", "id": f"relationship--{kind}{source}{target}", "relationship_type": kind,
            "source_ref": source, "target_ref": target, "description": description}  # fmt: skip


def bundle() -> dict:
    """A small ATT&CK: a technique with a sub-technique, its mitigation, detection and user, and what is withdrawn."""
    phases = [{"kill_chain_name": "mitre-attack", "phase_name": "credential-access"}]
    objects = [
        stix("x-mitre-tactic", 1, "TA0006", "Credential Access", "x", x_mitre_shortname="credential-access"),
        stix("attack-pattern", 1, "T1003", "Dumping", "They dump [hashes](https://x.example/T1) (Citation: A (B) 2020).",
             kill_chain_phases=phases, x_mitre_platforms=["Linux"]),
        stix("attack-pattern", 2, "T1003.001", "Memory", "They read memory.", kill_chain_phases=phases),
        stix("attack-pattern", 3, "T1999", "Old", "Gone.", revoked=True),
        stix("attack-pattern", 4, "T1998", "Older", "Gone.", x_mitre_deprecated=True),
        stix("course-of-action", 1, "M1026", "Accounts", "Manage accounts."),
        stix("malware", 1, "S0001", "Grabber", "Grabber is malware.", x_mitre_aliases=["Grabber", "Grabby"]),
        stix("x-mitre-detection-strategy", 1, "DET1", "Watch", "", x_mitre_analytic_refs=["x-mitre-analytic--1"]),
        stix("x-mitre-analytic", 1, "AN1", "Analytic 1", "Reads of the memory of a process."),
        relation("mitigates", "course-of-action--1", "attack-pattern--1", "Keep few <code>admin</code> accounts."),
        relation("detects", "x-mitre-detection-strategy--1", "attack-pattern--1"),
        relation("subtechnique-of", "attack-pattern--2", "attack-pattern--1"),
        relation("uses", "malware--1", "attack-pattern--1", "Grabber dumps the registry."),
        relation("uses", "malware--1", "attack-pattern--3", "Grabber did an old thing."),
    ]  # fmt: skip
    return {"type": "bundle", "id": "bundle--1", "objects": objects}


def lookup_files() -> dict[str, str]:
    """The same in the form of the lookup package, as far as its form differs; one text is cut short."""
    technique = {"stix_id": "attack-pattern--1", "external_id": "T1003", "name": "Dumping", "tactics": ["credential-access"],
                 "platforms": ["Linux"], "revoked": False, "deprecated": False,
                 "description": "They dump hashes. Later they use them in anoth..."}  # fmt: skip
    files = {
        "attack_patterns": [technique],
        "tactics": [{"stix_id": "x-mitre-tactic--1", "name": "Credential Access", "shortname": "credential-access"}],
    }
    return {f"lookup/data/{name}.json": json.dumps({"_metadata": {}, name: v}) for name, v in files.items()}


def make_deb(
    folder: Path, package: str, version: str, members: dict[str, bytes | tarfile.TarInfo], packing: str = "xz"
) -> Path:
    """A .deb with these files (bytes) and other members (links, devices) in it."""
    control = {
        "control": f"Package: {package}\nVersion: {version}\nArchitecture: all\nDescription: made up\n more\n".encode()
    }
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": make_tar(control, "xz"),
        f"data.tar.{packing}": make_tar(members, packing),
    }
    archive = b"!<arch>\n"
    for name, data in parts.items():
        archive += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    deb = folder / f"{package}_{version}_all.deb"
    deb.write_bytes(archive)
    return deb


def make_tar(members: dict[str, bytes | tarfile.TarInfo], packing: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{packing}") as tar:
        for name, contents in members.items():
            if isinstance(contents, tarfile.TarInfo):
                tar.addfile(contents)
                continue
            info = tarfile.TarInfo(f"./{name}" if not name.startswith(("/", ".")) else name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def make_archive(folder: Path, *debs: Path, suite: str = "bookworm", sha: str | None = None) -> str:
    """A Debian archive of these packages, as an address; `sha`: what its index states instead of the truth."""
    paragraphs = []
    for deb in debs:
        package, version, _ = deb.name.split("_")
        pool = folder / "pool" / deb.name
        pool.parent.mkdir(parents=True, exist_ok=True)
        pool.write_bytes(deb.read_bytes())
        paragraphs.append(
            f"Package: {package}\nVersion: {version}\nDescription: x\n y\nFilename: pool/{deb.name}\n"
            f"SHA256: {sha or sha256(deb)}\n"
        )
    for architecture, contents in (("all", paragraphs), ("amd64", [])):
        index = folder / "dists" / suite / "main" / f"binary-{architecture}" / "Packages.xz"
        index.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(["Package: other\nVersion: 1\nFilename: x\nSHA256: 0\n", *contents])
        index.write_bytes(lzma.compress(text.encode()))
    return folder.as_uri()
