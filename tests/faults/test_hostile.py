"""Inputs made to do harm: nothing in them is run, written elsewhere or shown raw.

Elsewhere: tar members with `..` (tests/data/test_debian.py), `..` in names of files in wheels (tests/pretrained/
test_pypi.py), code of repositories (tests/pretrained/test_load.py), the class allow-list of checkpoint indices
(tests/train/test_fit.py), YAML tags in recipe files (tests/test_config.py).
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from adapt.config import load, resolve
from adapt.console import CONTROL
from adapt.data.wheel_files import WheelFiles
from adapt.distributed import checkpoint
from adapt.distributed.checksums import SUMS
from adapt.errors import StopRequested, UserError
from adapt.runfolder import RunFolder
from adapt.train.fit import fit
from adapt.wheels import Wheel
from tests.recipes import corpus, tiny_recipe
from tests.train.test_fit import stop_after

TITLE, ESCAPE, TURN = "\x1b]0;pwned\x07", "\x1b[31m", "\u202e"
"""They would rename the terminal, colour what comes after them, and show text backwards."""


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def stopped(tiny_base, tmp_path, monkeypatch):
    """A run that has a checkpoint and is to be gone on with."""
    recipe = tiny_recipe(tiny_base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 2)
        fit(resolve(recipe))
    return recipe


def texts_of(run: Path) -> dict[str, str]:
    return {name: (run / name).read_text(encoding="utf-8") for name in ("log.txt", "report.html", "export/README.md")}


def test_control_characters_reach_no_terminal_log_or_report(warm, tiny_base, tmp_path):
    """Of prompts, of file and dataset names, and of folders; the model's own bytes are shown as escapes, too."""
    odd = corpus(tmp_path, 12, seed=1).rename(tmp_path / f"held{ESCAPE}out.jsonl")
    plain = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 1, "batch_tokens": 256})
    recipe = plain | {
        "run": {**plain["run"], "dir": str(tmp_path / f"runs{ESCAPE}")},
        "data": {
            **plain["data"],
            "train": [{**plain["data"]["train"][0], "name": f"tr{TITLE}ain"}],
            "eval": [{"source": {"name": "jsonl", "path": str(odd)}, "name": f"held{TURN}{ESCAPE}out"}],
        },
    }
    recipe["generation"] |= {"prompts": [f"the {TITLE}{ESCAPE}[bold]model{TURN}"]}
    done = warm.attempt(recipe, tmp_path / "cache")
    said = done["said"]
    assert done["code"] == 0, said
    run = Path(recipe["run"]["dir"]) / "tiny"
    for name, text in {"terminal": said, **texts_of(run)}.items():
        raw = {match[0] for match in CONTROL.finditer(text)} - {"\r"}  # \r: bars of transformers
        assert not raw, f"{name}: {raw}"
    assert "\\x1b" in said
    assert "[bold]model" in said, "nor is it markup"


def test_a_pickle_in_a_checkpoint_is_not_run(stopped, tmp_path):
    """The index of the tensors, which is a pickle by torch's own format. Who writes it can write its sum, or none."""
    (saved,) = checkpoint.checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")
    (saved / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "mark")))
    (saved / SUMS).unlink()
    with pytest.raises(UserError, match=r"mkdir, which has no place in a checkpoint"):
        fit(resolve(stopped), "yes")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"step": 1, "unheard_of": 2}', "\xff"])
def test_numbers_of_a_checkpoint_that_are_none(text, stopped, tmp_path):
    (saved,) = checkpoint.checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")
    (saved / checkpoint.STATE).write_bytes(text.encode("latin-1"))
    (saved / SUMS).unlink()
    with pytest.raises(UserError, match=r"state\.json"):
        fit(resolve(stopped), "yes")


def test_a_pickle_among_token_shards_is_not_run(tiny_base, tmp_path, monkeypatch):
    """A cache that others may write: arrays of objects are pickles."""
    monkeypatch.setenv("ADAPT_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 0, "batch_tokens": 256})
    fit(resolve(recipe))
    files = list((tmp_path / "cache" / "data").rglob("*.npy"))
    assert files
    for file in files:
        np.save(file, np.array([Payload(tmp_path / "mark")], dtype=object), allow_pickle=True)
    with pytest.raises(UserError):
        fit(resolve(recipe | {"run": {**recipe["run"], "name": "again"}}))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "..", "a/../../b", "", "."])
def test_a_run_stays_in_its_folder(name, tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, run={"name": name}, trainer={"steps": 0, "batch_tokens": 256})
    with pytest.raises(UserError, match=r"run\.name"):
        fit(resolve(recipe))
    assert not (tmp_path / "escaped").exists()


def test_yaml_tags_in_a_run_folder_are_not_run(stopped, tmp_path):
    """A run folder from somebody else: its config is read by resume, report, export and push."""
    run = tmp_path / "runs" / "tiny"
    (run / "config.yaml").write_text(f"run: !!python/object/apply:os.mkdir ['{tmp_path / 'mark'}']\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        RunFolder.open(run).resolved()
    with pytest.raises(UserError, match=r"not valid YAML"):
        load(str(run / "config.yaml"))
    assert not (tmp_path / "mark").exists()


def test_names_in_a_wheel_are_names_only(tmp_path):
    """Members that climb out of the archive are read under their names; nothing is unpacked by them."""
    cache, wheel = tmp_path / "a" / "cache", Wheel("evil", "1.0", "0" * 64)
    files = WheelFiles(wheel)
    files.use_cache(cache)
    files.folder.mkdir(parents=True)
    with zipfile.ZipFile(files.folder / "evil-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("../../../../../escaped.txt", "x")
        archive.writestr("/escaped.txt", "y")
    before = sorted(tmp_path.rglob("*"))
    assert files.read("*.txt") == {"../../../../../escaped.txt": b"x", "/escaped.txt": b"y"}
    assert sorted(tmp_path.rglob("*")) == before
