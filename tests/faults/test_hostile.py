"""Inputs made to do harm: nothing in them is run, written elsewhere or shown raw.

Checkpoints of somebody else: test_hostile_checkpoints.py. Elsewhere: tar members with `..` (tests/data/test_debian.py), `..` in names of files in wheels (tests/pretrained/
test_pypi.py), code of repositories (tests/pretrained/test_load.py), YAML tags in recipe files (tests/test_config.py).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from adapt.attempts import me
from adapt.cli import main
from adapt.config import load, resolve
from adapt.config.text import write_yaml
from adapt.console import CONTROL
from adapt.data.wheel_files import WheelFiles
from adapt.distributed import checkpoint
from adapt.distributed.checksums import SUMS
from adapt.errors import UserError
from adapt.runfolder import RunFolder
from adapt.train.fit import fit
from adapt.wheels import Wheel
from tests.recipes import corpus, tiny_recipe

TITLE, ESCAPE, TURN = "\x1b]0;pwned\x07", "\x1b[31m", "\u202e"
"""They would rename the terminal, colour what comes after them, and show text backwards."""


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


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


HARM = {
    "a call": "!!python/object/apply:os.mkdir [{mark}]",
    "a new object": "!!python/object/new:os.mkdir [[{mark}]]",
    "a name": "!!python/name:os.system",
    "a module": "!!python/module:os",
    "a tuple": "!!python/tuple [1]",
    "itself": "&a [*a]",
    "itself, by name": "&a {{b: *a}}",
    "aliases that double": "[&a0 [x, x], " + ", ".join(f"&a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)) + "]",
    "depth": "[" * 3000,
    "a number that is none": "!!int x",
    "a truth that is none": "!!bool maybe",
    "bytes": "!!binary aGk=",
    "a set": "!!set {{a}}",
    "a date": "!!timestamp 2026-01-01",
}
"""YAML that is more than text, numbers, lists and mappings."""


@pytest.mark.parametrize("place", ["file", "extended", "override", "section", "arm"])
@pytest.mark.parametrize("kind", HARM)
def test_yaml_that_does_more_than_say(kind, place, tiny_base, tmp_path):
    """In a recipe of -c, in one that it extends, in an override on the command line or of a sweep, in a stage, in an arm."""
    text, mark = HARM[kind].format(mark=tmp_path / "mark"), tmp_path / "mark"
    plain = tmp_path / "plain.yaml"
    plain.write_text(write_yaml(tiny_recipe(tiny_base, tmp_path)))
    file, overrides = tmp_path / "recipe.yaml", []
    if place == "override":
        file, overrides = plain, [f"run.name={text}"]
    elif place == "extended":
        (tmp_path / "other.yaml").write_text(f"run:\n  name: {text}\n")
        file.write_text("extends: other.yaml\n")
    elif place == "arm":
        file.write_text(f"extends: plain.yaml\narms:\n  low:\n    optimizer: {text}\n")
    else:
        key = {"file": "run:\n  name: ", "section": "optimizer: "}[place]
        file.write_text(f"extends: plain.yaml\n{key}{text}\n")
    with pytest.raises(UserError):
        load(str(file), overrides)
    assert not mark.exists()


@pytest.mark.parametrize("order", [["fit"], ["validate"], ["plan", "--gpus", "8", "--gpu-memory", "80"]])
def test_words_of_the_command_line_steer_no_terminal(order, tiny_base, tmp_path, capfd):
    file = tmp_path / "recipe.yaml"
    file.write_text(write_yaml(tiny_recipe(tiny_base, tmp_path)))
    for words in (
        [f"run.na{ESCAPE}me=x"],
        [f"optimizer.name={TITLE}"],
        [f"model.base={ESCAPE}/nowhere{TURN}"],
        [f"data.train[0].source.path={tmp_path}/no{TITLE}"],
    ):
        assert main([*order, "-c", str(file), *words]) == 2
    assert main([*order, "-c", f"no{ESCAPE}where.yaml"]) == 2
    shown = "".join(capfd.readouterr())
    assert "\\x1b" in shown
    assert not CONTROL.findall(shown.replace("\r", ""))


@pytest.mark.parametrize(
    "record",
    [
        {"from_step": "1", "step": [2], "ended": "x", "code": TITLE},
        {"host": f"<script>alert(1)</script>{ESCAPE}", "ended": f"{TITLE}<b>", "reason": f"<img src=x>{TURN}"},
        {"pid": -5, "process_began": "x", **{key: me()[key] for key in ("host", "kernel")}},
        {"pid": 2**70, **{key: me()[key] for key in ("host", "kernel")}},
        {key: me()[key] for key in ("host", "kernel")},
    ],
)
def test_an_attempt_of_somebody_else_is_shown_as_text(record, stopped, tmp_path, capfd):
    run = tmp_path / "runs" / "tiny"
    (run / "attempts" / "7.json").write_text(json.dumps(record))
    assert fit(resolve(stopped), "yes") == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    for text in (page, "".join(capfd.readouterr()), (run / "log.txt").read_text()):
        assert not [c for c in CONTROL.findall(text) if c != "\r"]


def test_pickled_weights_of_a_base_are_not_read(tiny_base, tmp_path):
    """By whatever name, beside a tokenizer or an index that points to them."""
    base, mark = tmp_path / "evil", tmp_path / "mark"
    shutil.copytree(tiny_base, base)
    for file in base.glob("*.safetensors"):
        file.unlink()
    names = ("pytorch_model.bin", "model.pt", "tokenizer.bin", "vocab.pkl", "training_args.bin", "optimizer.pt")
    for name in names:
        torch.save(Payload(mark), base / name)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    for name in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (base / name).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"pickled weights can run code|cannot be loaded"):
        fit(resolve(tiny_recipe(base, tmp_path)))
    shutil.copy(tiny_base / "model.safetensors", base / "model-00001-of-00002.safetensors")
    for elsewhere in ("pytorch_model.bin", "../evil/x.safetensors", "/x.safetensors", 3):
        index["weight_map"]["model.norm.weight"] = elsewhere
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"only \.safetensors files next to it are read"):
            fit(resolve(tiny_recipe(base, tmp_path)))
    assert not mark.exists()
    for file in base.glob("*.index.json"):
        file.unlink()
    (base / "model-00001-of-00002.safetensors").rename(base / "model.safetensors")
    assert fit(resolve(tiny_recipe(base, tmp_path, trainer={"steps": 1, "batch_tokens": 256}))) == 0, "they lie there"
    assert not mark.exists()


@pytest.mark.parametrize("suffix", ["bin", "pkl", "npy", "pt", "arrow", "parquet", "jsonl", "jsonl.gz", "txt"])
def test_a_pickle_in_a_data_set_is_not_run(suffix, tiny_base, tmp_path):
    """Among the files of a folder, by any name."""
    folder, mark = tmp_path / "data", tmp_path / "mark"
    folder.mkdir()
    corpus(folder)
    (folder / f"evil.{suffix}").write_bytes(pickle.dumps(Payload(mark)))
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 1, "batch_tokens": 256})
    recipe["data"]["train"] = [{"source": {"name": "path", "path": str(folder)}, "name": "train"}]
    with suppress(UserError):  # lines that are none, a file that is no Parquet
        fit(resolve(recipe))
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["", "{% generation %}x{% endgeneration %}"])
@pytest.mark.parametrize(
    "way",
    [
        "cycler.__init__.__globals__.os.mkdir('{mark}')",
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.append({{}})",
        "raise_exception.__globals__['os'].mkdir('{mark}')",
        "'{title}'",
    ],
)
def test_a_chat_template_is_no_program(way, tag, tiny_base, tmp_path, capfd):
    """A tokenizer's template is Jinja, from whoever made the base."""
    base, mark = tmp_path / "evil", tmp_path / "mark"
    shutil.copytree(tiny_base, base)
    calls = way.format(mark=mark, title=TITLE)
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}" + tag + "{{ " + calls + " }}"
    )
    chats = [{"messages": [{"role": "user", "content": "a page"}, {"role": "assistant", "content": "reads"}]}] * 20
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    recipe = tiny_recipe(base, tmp_path, trainer={"steps": 1, "batch_tokens": 256})
    recipe["data"]["train"] = [
        {"source": {"name": "jsonl", "path": str(tmp_path / "chats.jsonl")}, "name": "chats"},
        *recipe["data"]["train"],
    ]
    with (
        suppress(UserError) if TITLE in calls else pytest.raises(UserError, match="refuses it: access to .* is unsafe")
    ):
        fit(resolve(recipe))
    assert not mark.exists()
    assert not [c for c in CONTROL.findall("".join(capfd.readouterr())) if c != "\r"]


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
