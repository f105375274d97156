"""Where the starting weights come from: what a model card must say."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from adapt.config.schema import Model
from adapt.pretrained.bases import CONFIG, NotReachable, locate, parse
from adapt.pretrained.gguf import BASE_FILE, cached_folder
from adapt.pretrained.pypi import known

EXPORT_FILE = "adapt.json"


def base_provenance(model: Model) -> dict[str, Any]:
    """`base_model` (a name to show), and where known `license`, `note`, `revision`, `source`. Downloads nothing."""
    base = parse(model.base)
    if base.kind == "hub":
        facts = {"base_model": base.text, "revision": model.revision}
        with contextlib.suppress(NotReachable):
            facts["revision"] = locate(base, model.revision, CONFIG, offline=True).name  # the snapshot's commit
        return facts
    folder = Path(base.text) if base.kind == "folder" else cached_folder(base)
    if (folder / BASE_FILE).is_file():
        facts = json.loads((folder / BASE_FILE).read_text())
    elif (folder / EXPORT_FILE).is_file():  # an export goes on: its base stays the base
        facts = json.loads((folder / EXPORT_FILE).read_text()).get("base", {})
    elif base.kind == "pypi" and (entry := known(base)):
        facts = {"source": base.text, "sha256": entry.sha256, **entry.facts}
    else:
        facts = {}
    name = f"{base.package}=={base.version}" if base.kind == "pypi" else Path(base.text).resolve().name
    return {"base_model": name, **facts}
