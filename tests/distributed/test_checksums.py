"""Checkpoints that rotted: whatever is wrong with whichever file, it is found before anything is loaded from it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from adapt.config import resolve
from adapt.distributed import checkpoint, healthy
from adapt.distributed.checksums import SUMS, damage
from adapt.distributed.world import World
from adapt.errors import StopRequested, UserError
from adapt.train.fit import fit
from tests.ranks import on_ranks
from tests.recipes import tiny_recipe
from tests.train.test_fit import losses, poison, stop_after


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = torch.nn.Linear(5, 3)


HERE = World(0, 0, 1, 1, torch.device("cpu"))
FILES = ["__0_0.distcp", ".metadata", "state.json", "optimizer.json", SUMS]


def stepped() -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(0)
    root = Small()
    optimizer = torch.optim.AdamW(root.parameters())
    root.student(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    return root, optimizer


@pytest.fixture
def saved(tmp_path) -> Path:
    return checkpoint.save(tmp_path / "checkpoints", 3, *stepped(), {"step": 3}, HERE)


def flip(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


def test_sums_are_those_of_the_files_and_of_all_of_them(saved):
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=saved, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in saved.iterdir()) == sorted(FILES)
    assert damage(saved) == ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["first bit", "middle bit", "last bit", "cut", "emptied", "gone"])
def test_any_damage_to_any_file_is_found_before_anything_is_loaded(saved, name, how):
    file = saved / name
    size = file.stat().st_size
    if how == "gone":
        file.unlink()
    elif how in ("cut", "emptied"):
        file.write_bytes(file.read_bytes()[: size // 2 if how == "cut" else 0])
    else:
        flip(file, {"first bit": 0, "middle bit": size // 2, "last bit": -1}[how])
    if (name, how) == (SUMS, "gone"):
        assert damage(saved) == "", "that of an earlier adapt has none"
        return
    root = Small()
    before = {n: p.clone() for n, p in root.named_parameters()}
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(saved, root, None)
    assert all(torch.equal(before[n], p) for n, p in root.named_parameters())


def test_a_file_that_is_not_the_checkpoints_is_named(saved):
    (saved / "__1_0.distcp").write_bytes(b"of another save")
    assert "__1_0.distcp" in damage(saved)


def share(folder: str) -> None:
    """Both ranks hear of what one of them reads."""
    from adapt.distributed.checksums import damage_of

    for path in sorted(Path(folder).iterdir()):
        assert path.name in damage_of(path)


def test_ranks_share_the_reading_and_the_verdict(saved, tmp_path):
    rotten = tmp_path / "rotten"
    for name in FILES[:-1]:
        folder = shutil.copytree(saved, rotten / name)
        flip(folder / name, 1)
    on_ranks(2, tmp_path, share, str(rotten))


def test_a_file_that_did_not_arrive_as_it_was_written_counts_as_damaged(tmp_path, monkeypatch):
    """The sum is taken of what is handed over, so a disk that loses bytes without a word is found out."""
    import io

    from adapt.distributed import checksums

    class Lossy(io.FileIO):
        def write(self, data) -> int:
            super().write(bytes(len(data)))
            return len(data)

    monkeypatch.setattr(checksums.io, "FileIO", Lossy)
    path = checkpoint.save(tmp_path, 1, *stepped(), {}, HERE)
    assert "does not hold what was written" in damage(path)


def interrupted(base, folder) -> tuple[dict, Path]:
    """A run with checkpoints of steps 1, 2 and 3 of 6."""
    recipe = tiny_recipe(base, folder, checkpoint={"every": 1, "keep": 3})
    recipe["evaluation"] = {}
    with pytest.MonkeyPatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 3)
        fit(resolve(recipe))
    return recipe, folder / "runs" / "tiny"


def test_a_run_goes_on_from_the_newest_healthy_checkpoint_and_says_why(tiny_base, tmp_path, capsys):
    recipe, run = interrupted(tiny_base, tmp_path)
    folder = run / "checkpoints"
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-1", "step-2", "step-3"]
    shards = sorted((folder / "step-3").glob("*.distcp"))
    flip(shards[0], 100)
    (folder / "step-2" / ".metadata").unlink()
    recipe["checkpoint"]["keep"] = 1
    assert fit(resolve(recipe), "yes") == 0
    said = (run / "log.txt").read_text()
    assert f"step-3 is damaged: {shards[0].name} does not hold" in said
    assert "step-2 is damaged: .metadata is gone" in said
    assert "going on from step-1" in said
    assert "damaged-step-3" in capsys.readouterr().out
    assert (folder / "damaged-step-3").is_dir(), "nothing is deleted that a user may want to look at"
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-6"]
    assert max(losses(run)) == 6


def test_a_rewind_passes_over_a_damaged_checkpoint_and_saves_it_again(tiny_base, tmp_path, monkeypatch):
    from adapt.train.hooks import Hooks

    folder, original = tmp_path / "runs" / "tiny" / "checkpoints", Hooks.bad_update

    def rots(self, *args):
        self.saver.finish()
        flip(folder / "step-4" / "__0_0.distcp", 50)
        return original(self, *args)

    monkeypatch.setattr(Hooks, "bad_update", rots)
    poison(monkeypatch, at=6)
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 6, "batch_tokens": 256, "non_finite": "rewind"})
    fit(resolve(recipe | {"checkpoint": {"every": 2, "keep": 3}, "evaluation": {}}))
    said = (folder.parent / "log.txt").read_text()
    assert "step-4 is damaged" in said
    assert "rewound to step-2" in said
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-2", "step-4", "step-6"]
    assert all(damage(path) == "" for path in checkpoint.checkpoints(folder))


def test_with_no_healthy_checkpoint_a_run_ends_with_a_letter_and_touches_nothing(tiny_base, tmp_path):
    recipe, run = interrupted(tiny_base, tmp_path)
    folder = run / "checkpoints"
    for path in checkpoint.checkpoints(folder):
        flip(path / "state.json", 5)
    with pytest.raises(UserError, match="no checkpoint is left") as raised:
        fit(resolve(recipe), "yes")
    assert all(f"step-{n}" in str(raised.value) for n in (1, 2, 3))
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-1", "step-2", "step-3"]


def test_retention_counts_no_damaged_checkpoint_among_those_it_keeps(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, *stepped(), {}, HERE)
    flip(tmp_path / "step-3" / "__0_0.distcp", 9)
    assert healthy.take_newest(tmp_path, HERE, lambda _: None) == tmp_path / "step-2"
    checkpoint.prune(tmp_path, keep=1, protect=set())
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-2"]
    assert damage(tmp_path / "step-2") == ""
