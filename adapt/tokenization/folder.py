"""A tokenizer folder, extended or pruned: the base's files with another tokenizer.json, loadable by transformers 4 and 5."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from adapt.errors import Problem, UserError
from adapt.pretrained.bases import TOKENIZER_FILES
from adapt.tokenization.byte_bpe import FILE, ByteBpe

MARKER = "adapt_tokenizer.json"
"""Says what a folder was made from; only folders that have it are replaced."""
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
CLASS = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it stands, in transformers 4 and 5. `TokenizersBackend`, which version 5 writes,
is unknown to version 4 and to what is built on it; and a model's own class is rebuilt by version 5 from vocabulary and
merges, without the pre-tokenizer of tokenizer.json."""
STALE = ("vocab*", "merges.txt", "*.model", MARKER)
"""Second copies of the old vocabulary: a tool that read them would give other ids."""
LOCAL = ("auto_map", "backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file")
"""Keys that mean something only where the base was loaded."""


def check_out(out: Path, where: str = "out") -> list[Problem]:
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        what = f"{out} exists and was not made by `adapt tokenizer`; give another folder or name"
        return [Problem(where, what)]
    return []


def write(base: Path, bpe: ByteBpe, folder: Path) -> None:
    """Write the tokenizer into `folder` (new): the base's files, but for those that hold its vocabulary."""
    folder.mkdir(parents=True)
    left_out = {path for pattern in (*STALE, FILE, CONFIG) for path in base.glob(pattern)}
    for pattern in TOKENIZER_FILES:
        for path in base.glob(pattern):
            if path.is_file() and path not in left_out:
                shutil.copyfile(path, folder / path.name)
    (folder / FILE).write_text(bpe.text, "utf-8")
    (folder / CONFIG).write_text(json.dumps(_config(base), indent=2, ensure_ascii=False) + "\n", "utf-8")


def _config(base: Path) -> dict[str, Any]:
    file = base / CONFIG
    try:
        fields = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(Problem("base", f"{file} is not valid JSON: {error}")) from None
    fields = {key: value for key, value in fields.items() if key not in LOCAL} | {"tokenizer_class": CLASS}
    if (base / TEMPLATE).is_file():  # a file of its own is not seen by earlier versions of transformers
        fields.setdefault("chat_template", (base / TEMPLATE).read_text("utf-8"))
    return fields


def sha256(folder: Path) -> str:
    """Of tokenizer.json: what data that was tokenised with it belongs to."""
    return hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


def swap(new: Path, out: Path) -> None:
    """`new` takes the place of `out`, which is there whole or not at all."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)
