"""A run folder from somebody else, gone on with: nothing in its checkpoint runs code, reads or writes elsewhere.

Who writes a checkpoint can write its sums, or none. (Pickles in place of the index: test_hostile.py.)
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from adapt.config import resolve
from adapt.distributed import checkpoint
from adapt.distributed.checksums import SUMS
from adapt.distributed.index import ALLOWED, Reader
from adapt.distributed.reshard import reshard
from adapt.errors import UserError
from adapt.train.fit import fit
from adapt.train.state import State
from tests.faults.test_hostile import Payload

META, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"


@pytest.fixture
def stopped(stopped, tmp_path):
    """Its recipe, and its checkpoint without sums."""
    (saved,) = checkpoint.checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")
    (saved / SUMS).unlink()
    return stopped, saved


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


def name(module: str, what: str) -> bytes:
    """STACK_GLOBAL: the object of that name."""
    return text(module) + text(what) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def gadgets(mark: Path) -> dict[str, bytes]:
    """Ways from names that a checkpoint may well use to `os.mkdir(mark)`."""
    getattr_, here = name("builtins", "getattr"), text(str(mark))
    return {
        "a module inside an allowed one": call(call(getattr_, name(META, "os"), text("mkdir")), here),
        "a name with dots": call(name(META, "os.mkdir"), here),
        "a class's way to its module": call(
            call(getattr_, call(getattr_, name(META, "Metadata"), text("__init__")), text("__globals__"))
        ),
        "a torch function that imports": call(name("torch", "hub.load"), here),
        "operators": call(
            call(name(FILES, "operator.methodcaller"), text("mkdir")), call(name("pathlib", "Path"), here)
        ),
        "a method of a path": call(call(getattr_, call(name("pathlib", "Path"), here), text("mkdir"))),
        "an unpickler without restriction": call(name(FILES, "pickle.loads"), text("x")),
        "a file opened": call(name("builtins", "open"), here, text("w")),
        "torch's loader": call(name("torch", "load"), here),
        "import": call(name("builtins", "__import__"), text("os")),
    }


@pytest.mark.parametrize("way", gadgets(Path()))
def test_an_index_reaches_nothing_that_acts(way, tmp_path):
    mark = tmp_path / "mark"
    data = b"\x80\x04" + gadgets(mark)[way] + b"."
    pickletools.dis(data, io.StringIO())  # it is one
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        Reader(str(tmp_path)).read_metadata()
    assert not mark.exists()


def test_what_an_index_may_name_are_plain_records():
    """None is a module, and none but one is a function, which looks a word up."""
    for module, what in ALLOWED:
        found = getattr(__import__(module, fromlist=[what]), what)
        assert isinstance(found, type) or what == "_get_layout", (module, what)


def changed(saved: Path, change) -> None:
    index = pickle.loads((saved / ".metadata").read_bytes())
    change(index)
    (saved / ".metadata").write_bytes(pickle.dumps(index))


def first(index: Metadata) -> MetadataIndex:
    return next(place for place in index.storage_data if place.fqn.startswith("model/"))


def test_bytes_among_the_tensors_are_not_unpickled(stopped, tmp_path):
    """torch's own loader takes an entry that is no tensor for a pickle, and runs it."""
    recipe, saved = stopped
    payload = io.BytesIO()
    torch.save({"x": Payload(tmp_path / "mark")}, payload)
    (saved / "__9_0.distcp").write_bytes(payload.getvalue())

    def to_bytes(index: Metadata) -> None:
        place = first(index)
        info = index.storage_data.pop(place)
        info.relative_path, info.offset, info.length = "__9_0.distcp", 0, payload.tell()
        index.storage_data[MetadataIndex(place.fqn)] = info
        index.state_dict_metadata[place.fqn] = BytesStorageMetadata()

    changed(saved, to_bytes)
    with pytest.raises(UserError, match="has no place in a checkpoint"):
        fit(resolve(recipe), "yes")
    with pytest.raises(UserError, match="has no place in a checkpoint"):
        reshard(saved, tmp_path / "to", 2)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["torch", "plain", "noise"])
def test_a_pickle_among_the_tensors_files_is_not_run(kind, stopped, tmp_path):
    recipe, saved = stopped
    payload = io.BytesIO()
    if kind == "torch":
        torch.save(Payload(tmp_path / "mark"), payload)
    else:
        payload.write(pickle.dumps(Payload(tmp_path / "mark")) if kind == "plain" else b"noise" * 100)
    (file,) = saved.glob("*.distcp")
    file.write_bytes(payload.getvalue())

    def whole(index: Metadata) -> None:
        for info in index.storage_data.values():
            info.offset, info.length = 0, payload.tell()

    changed(saved, whole)
    with pytest.raises(UserError, match="cannot be read"):
        fit(resolve(recipe), "yes")
    with pytest.raises(UserError, match="cannot be read"):
        reshard(saved, tmp_path / "to", 2)
    assert not (tmp_path / "mark").exists()


def test_torchs_own_reader_would_have_run_it(tmp_path):
    """What the tests above are for: where torch learns to refuse this itself, they prove nothing."""
    (tmp_path / ".metadata").write_bytes(
        b"\x80\x04" + gadgets(tmp_path / "mark")["a module inside an allowed one"] + b"."
    )
    with pytest.raises(AttributeError):  # None, that mkdir returns, is no index
        dcp.FileSystemReader(str(tmp_path)).read_metadata()
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["../../../secret", "/etc/passwd", "", ".", "..", "a/b", 7])
def test_a_tensor_is_read_from_the_checkpoints_files_only(file, stopped):
    recipe, saved = stopped

    def elsewhere(index: Metadata) -> None:
        index.storage_data[first(index)].relative_path = file

    changed(saved, elsewhere)
    with pytest.raises(UserError, match="no file of its own"):
        fit(resolve(recipe), "yes")


@pytest.mark.parametrize(
    ("what", "value"),
    [("offset", -1), ("length", -5), ("offset", 2**70), ("offset", "0"), ("transform_descriptors", ["x"])],
)
def test_places_that_no_file_has(what, value, stopped):
    recipe, saved = stopped
    changed(saved, lambda index: setattr(index.storage_data[first(index)], what, value))
    with pytest.raises(UserError, match="that a file of ours has"):
        fit(resolve(recipe), "yes")


@pytest.mark.parametrize("size", [(2**40, 2**40), (2**62,), ()])
def test_sizes_that_are_not_the_models(size, stopped, tmp_path):
    """None is allocated."""
    recipe, saved = stopped
    changed(saved, lambda index: setattr(index.state_dict_metadata[first(index).fqn], "size", torch.Size(size)))
    with pytest.raises(UserError, match="cannot be read"):
        fit(resolve(recipe), "yes")
    with pytest.raises(UserError, match="cannot be read"):
        reshard(saved, tmp_path / "to", 2)
    assert not list((tmp_path / "to").glob("*"))


@pytest.mark.parametrize(
    "over",
    [
        {"step": -1},
        {"step": 10**30},
        {"stage_step": float("nan")},
        {"seconds": float("inf")},
        {"seconds": float("nan")},
        {"stage": 7},
        {"stage": True},
        {"tokens": "1"},
        {"read": {}, "skipped": -3},
        {"results": []},
        {"minima": {"a": 3}},
        {"finished": "never"},
        {"decided": "x"},
        {"norms": None},
    ],
)
def test_numbers_that_no_run_has(over, stopped):
    """Python's JSON has NaN and Infinity, too."""
    recipe, saved = stopped
    state = json.loads((saved / checkpoint.STATE).read_text())
    (saved / checkpoint.STATE).write_text(json.dumps(state | over))
    with pytest.raises(UserError):
        fit(resolve(recipe), "yes")


def test_every_state_of_ours_is_one():
    """A metric may be NaN."""
    state = State(step=3, best=float("nan"), results={"before": {"bpb/x": float("inf")}}, minima={"bpb/x": [1.0, 2]})
    again = State.from_dict(json.loads(json.dumps(state.to_dict())))
    assert repr(again) == repr(State(**{**state.to_dict(), "minima": {"bpb/x": [1.0, 2.0]}}))


@pytest.mark.parametrize("content", ["[" * 100_000, '["adamw"]', "{", '{"model": 3}'])
def test_an_optimizers_file_that_is_none(content, stopped):
    recipe, saved = stopped
    (saved / checkpoint.ALGORITHMS).write_text(content)
    try:
        fit(resolve(recipe), "yes")
    except UserError:
        assert content != '{"model": 3}', "a name that is none of the model's says nothing"


def test_deep_nesting_is_no_traceback(stopped):
    recipe, saved = stopped
    (saved / checkpoint.STATE).write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"state\.json"):
        fit(resolve(recipe), "yes")


def test_links_are_removed_and_what_they_lead_to_stays(stopped, tmp_path):
    """Where checkpoints are written, taken back and deleted."""
    recipe, saved = stopped
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious.txt").write_text("x")
    (kept / "state.json").write_text("{}")
    names = [".partial-step-4", ".partial-step-4.2", ".replaced-step-2", ".partial-step-6.2", "step-1"]
    for link in names:
        (saved.parent / link).symlink_to(kept)
    fit(resolve({**recipe, "checkpoint": {"every": 2, "keep": 1}}), "yes")
    assert sorted(p.name for p in kept.iterdir()) == ["precious.txt", "state.json"]
    assert (kept / "state.json").read_text() == "{}"
    assert not [link for link in names if (saved.parent / link).is_symlink()]


@pytest.mark.parametrize("link", ["log.txt", "metrics.jsonl", "report.html", "attempts/.2.json.partial", "new.txt"])
def test_a_run_writes_through_no_link(link, stopped, tmp_path):
    recipe, saved = stopped
    run, target = saved.parents[1], tmp_path / ".bashrc"
    if link != "new.txt":
        target.write_text("mine\n")
    (run / link).unlink(missing_ok=True)
    (run / link).symlink_to(target)
    with pytest.raises(UserError, match=r"links to files elsewhere"):
        fit(resolve(recipe), "yes")
    assert not target.exists() or target.read_text() == "mine\n"


def test_checkpoints_on_another_disk_and_links_within_the_run_are_fine(stopped, tmp_path):
    recipe, saved = stopped
    elsewhere = tmp_path / "disk"
    saved.parent.rename(elsewhere)
    (tmp_path / "runs" / "tiny" / "checkpoints").symlink_to(elsewhere)
    (tmp_path / "runs" / "tiny" / "newest.txt").symlink_to("log.txt")
    assert fit(resolve(recipe), "yes") == 0
