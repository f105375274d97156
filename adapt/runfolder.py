"""The run folder: all of one run, in one place. Only rank 0 writes; the others may read."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import uuid
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from adapt.attempts import Attempt, claim
from adapt.config import Resolved, encode, resolve
from adapt.config.text import read_yaml
from adapt.console import printable
from adapt.errors import Problem, UserError

CONFIG, ENVIRONMENT, METRICS, LOG, DATA = "config.yaml", "environment.json", "metrics.jsonl", "log.txt", "data.json"
GRIDS = "grids.jsonl"
ARMS, COMPARISON = "recipe.yaml", "comparison.html"
"""In the folder around the runs of a recipe's arms: the recipe, resolved, and the page of all of them."""

MAY_CHANGE = (
    "run.dir",
    "data.cache",
    "trainer.steps",
    "trainer.tokens",
    "trainer.max_time",
    "trainer.mesh",
    "trainer.devices",
    "trainer.timeout",
    "trainer.start_timeout",
    "trainer.microbatch",
    "trainer.deterministic",
    "trainer.non_finite",
    "trainer.spike",
    "trainer.max_non_finite",
    "logging",
    "checkpoint",
    "evaluation",
    "generation",
    "export",
)
"""What a resumed run may do differently: how far, on what machines, what is kept and shown, and where folders live.
Everything else would make it another run."""


class RunFolder:
    def __init__(self, path: Path, *, main: bool = True, resumed: bool = False):
        self.path, self.main, self.resumed = path, main, resumed
        self.changed: list[tuple[str, str, str]] = []
        self.attempt: Attempt | None = None
        self._has_data = resumed

    @classmethod
    def create(cls, resolved: Resolved, resume: str = "no") -> RunFolder:
        """The folder of a run about to start (`no`), to go on (`yes`), or either (`auto`). Writes nothing: `begin` does.

        A run that came to an end before its first step and checkpoint has not started, and may be started again."""
        path = Path(resolved.recipe.run.dir) / resolved.recipe.run.name
        exists = (path / CONFIG).is_file()
        if exists and (links := _links(path)):
            raise UserError(
                Problem(
                    "run.name",
                    f"{path} holds links to files elsewhere: {', '.join(links[:5])}. A run writes to its files, and would write to what "
                    f"these lead to; put the files themselves there, or delete the links",
                )
            )
        started = any((path / "checkpoints").glob("step-*")) or _logged(path / METRICS)
        if (
            resume == "no"
            and path.exists()
            and (not path.is_dir() or (any(path.iterdir()) and (started or not exists)))
        ):
            what = "holds a run already" if exists else "exists already, and it is not a run"
            go_on = "go on with it (--resume), " if exists else ""
            raise UserError(Problem("run.name", f"{path} {what}: {go_on}choose another run.name, or delete it"))
        if resume == "yes" and not exists:
            raise UserError(
                Problem(
                    "--resume",
                    f"there is no run in {path} to go on with; start it without --resume, or use "
                    f"--resume=auto to do either",
                )
            )
        folder = cls(path, resumed=exists and resume != "no")
        before = folder.resolved() if exists and started else None
        folder.changed = changed = _changes(before, resolved) if before else []
        refused = [Problem(key, f"was {old}, is now {new}") for key, old, new in changed if not _may_change(key)]
        if refused:
            raise UserError(
                [
                    *refused,
                    Problem(
                        "",
                        f"a resumed run ({path}) cannot change these; set them back, or start a new "
                        f"run under another run.name",
                    ),
                ]
            )
        return folder

    def claim(self) -> None:
        """Take the folder for this process, once; raises UserError where another one trains in it."""
        if self.main and self.attempt is None:
            self.attempt = claim(self.path)

    def follow_attempt(self, generation: int) -> None:
        """For ranks other than the first: the attempt they are of."""
        if self.attempt is None:
            self.attempt = Attempt(self.path, generation)

    def guard(self) -> None:
        """Before every write: raises Superseded where a newer attempt has the folder."""
        if self.attempt is not None:
            self.attempt.check()

    @classmethod
    def follow(cls, resolved: Resolved, resume: str) -> RunFolder:
        """The same folder as seen from the other ranks, which write nothing."""
        path = Path(resolved.recipe.run.dir) / resolved.recipe.run.name
        return cls(path, main=False, resumed=resume != "no" and any((path / "checkpoints").glob("step-*")))

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """An existing run, to read."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} is not a run folder: it has no {CONFIG}")
        return cls(path, main=False, resumed=True)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def resolved(self) -> Resolved:
        """The recipe this run was last started with."""
        file = self.path / CONFIG
        try:
            return resolve(read_yaml(file.read_text(encoding="utf-8")))
        except UserError as error:
            raise UserError(
                [Problem(f"{file}: {p.where}" if p.where else str(file), p.what) for p in error.problems]
            ) from None
        except Exception as error:
            raise UserError(f"{file} cannot be read: {error}") from None

    def write_config(self, resolved: Resolved) -> None:
        self._write(CONFIG, resolved.to_yaml())

    def write_json(self, name: str, data: Any) -> None:
        self._write(name, json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n")

    def log(self, line: str) -> None:
        """A time-stamped line in log.txt. A disk that is full must not end a run before its checkpoint does."""
        if not self.main:
            return
        self.guard()
        try:
            with open(self.path / LOG, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(line)}\n")
        except OSError as error:
            warnings.warn(f"{self.path / LOG} cannot be written ({error.strerror}); its lines are lost", stacklevel=2)

    def add_grid(self, step: int, grid: dict[str, Any]) -> None:
        """A line in grids.jsonl: a table of an evaluation, for the report."""
        if not self.main:
            return
        self.guard()
        try:
            with open(self.path / GRIDS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **grid}) + "\n")
        except OSError as error:
            warnings.warn(f"{self.path / GRIDS} cannot be written ({error.strerror}); a grid is lost", stacklevel=2)

    def add_data(self, manifest: dict[str, Any]) -> None:
        """Into data.json: what a stage trains and measures on, besides what the stages before it used."""
        try:
            known = json.loads((self.path / DATA).read_text(encoding="utf-8")) if self._has_data else {}
        except (OSError, ValueError):
            known = {}
        train, held_out = known.get("train", []), known.get("eval", {})
        keys = {entry["config_fingerprint"] for entry in train}
        train += [entry for entry in manifest["train"] if entry["config_fingerprint"] not in keys]
        self.write_json(DATA, {**manifest, "train": train, "eval": {**held_out, **manifest["eval"]}})
        self._has_data = True

    def begin(self, resolved: Resolved) -> None:
        """Make the folder: everything that can be refused has been."""
        changed = self.changed
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.claim()
            self.write_config(resolved)
            before = self._environment()
            now = environment(resolved.recipe.run.seed)
            past = [*before.get("before", []), {k: v for k, v in before.items() if k != "before"}] if before else []
            self.write_json(ENVIRONMENT, {"id": before.get("id", uuid.uuid4().hex[:12]), **now, "before": past})
            self.log(f"{'resumed' if self.resumed else 'started'}: {now['command']}")
            if over := self.attempt.record.get("took_over"):
                self.log(f"attempt {self.attempt.generation} took over: the one before has no end, and {over}")
            for key, old, new in changed:
                self.log(f"changed: {key} from {old} to {new}")
        except OSError as error:
            raise UserError(Problem("run.dir", f"{self.path} cannot be written: {error.strerror}")) from None

    def _environment(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / ENVIRONMENT).read_text())
        except (OSError, ValueError):
            return {}

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all."""
        if not self.main:
            return
        self.guard()
        partial = self.path / f".{name}.partial"
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.path / name)
        except OSError as error:
            raise UserError(
                Problem("run.dir", f"{self.path / name} cannot be written: {error.strerror}. Make room, then --resume")
            ) from None


def _logged(metrics: Path) -> bool:
    """Whether a step was made, as far as the metrics tell."""
    try:
        return any('"loss"' in line for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError:
        return False


def environment(seed: int) -> dict[str, Any]:
    """Where and how this process runs."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["adapt", *sys.argv[1:]]),
        "seed": seed,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": _git(Path(__file__).parent),
        "hardware": _hardware(),
    }


PACKAGES = ("adapt-lm", "torch", "lightning", "transformers", "tokenizers", "safetensors", "numpy")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the code that runs, if it runs from a checkout."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", Path(__file__).name):  # some other repository around us
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware() -> dict[str, Any]:
    import psutil
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found[1].strip() if found else platform.processor()
    except OSError:
        return platform.processor()


def _links(run: Path) -> list[str]:
    """Links out of the run folder that a run would write through. Folders may be on another disk, and checkpoints are
    read only."""
    links = [p for p in run.rglob("*") if p.is_symlink() and not p.is_dir()]
    out = [p.relative_to(run) for p in links if not p.resolve().is_relative_to(run.resolve())]
    return sorted(str(name) for name in out if not name.match("checkpoints/*step-*/*"))


def _may_change(key: str) -> bool:
    key = re.sub(r"^stages\[\d+\]\.", "", key)
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def _changes(before: Resolved, after: Resolved) -> list[tuple[str, str, str]]:
    """(dotted key, old, new) of everything that differs, by stage; a key that differs alike in all of them once."""
    if before.names != after.names:
        return [("stages", ", ".join(before.names), ", ".join(after.names))]
    found: dict[tuple[str, str, str], list[int]] = {}
    for index, (old, new) in enumerate(zip(before.stages, after.stages, strict=True)):
        for difference in _differences(encode(old), encode(new), ""):
            found.setdefault(difference, []).append(index)
    return [
        (key if len(indices) == len(after.stages) else f"stages[{index}].{key}", old, new)
        for (key, old, new), indices in found.items()
        for index in (indices[:1] if len(indices) == len(after.stages) else indices)
    ]


def _differences(old: Any, new: Any, where: str):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{where}[{index}]")
    elif old != new:
        yield where, _short(old), _short(new)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."
