"""The code that an export carries: the files of adapt/models that its class needs, next to its weights.

transformers reads `auto_map` in config.json and, with `trust_remote_code=True`, runs these files where adapt is not
installed.
"""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MODELS = "adapt.models"


def carries_code(thing: Any) -> bool:
    """Whether the class of a model or config is ours, and has to travel with its weights."""
    return type(thing).__module__.rpartition(".")[0] == MODELS


def write_code(folder: Path, model: Any) -> None:
    """Copy what `type(model)` needs into `folder` and say so in its config.json; nothing for stock classes."""
    if not carries_code(model):
        return
    leaf = type(model).__module__.rpartition(".")[2]
    source = Path(sys.modules[type(model).__module__].__file__).parent
    for name in needed(source, leaf):
        shutil.copyfile(source / f"{name}.py", folder / f"{name}.py")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {
        "AutoConfig": f"{type(model.config).__module__.rpartition('.')[2]}.{type(model.config).__name__}",
        "AutoModelForCausalLM": f"{leaf}.{type(model).__name__}",
    }
    path.write_text(json.dumps(config, indent=2) + "\n")


def needed(source: Path, leaf: str) -> list[str]:
    """The file `leaf` and those it imports from its own folder, directly or through others."""
    found, waiting = set(), [leaf]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        tree = ast.parse((source / f"{name}.py").read_text())
        waiting += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module]
    return sorted(found)


def own_class(folder: Path) -> Any:
    """The model class of the folder's own code, run from there as a package without adapt; None where it has none."""
    auto_map = json.loads((folder / "config.json").read_text()).get("auto_map") or {}
    if "AutoModelForCausalLM" not in auto_map:
        return None
    leaf, _, name = auto_map["AutoModelForCausalLM"].rpartition(".")
    package = ModuleType("exported_code")
    package.__path__ = [str(folder)]
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[package.__name__] = package
    importlib.invalidate_caches()
    try:
        return getattr(importlib.import_module(f"{package.__name__}.{leaf}"), name)
    finally:
        sys.dont_write_bytecode = writes
        for module in [m for m in sys.modules if m.partition(".")[0] == package.__name__]:
            del sys.modules[module]
