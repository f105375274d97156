"""A disk that is full or read-only: the run ends with a letter, what was there stays, and it goes on when there is room."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests import tiny
from tests.faults.killing import differences, recipe_of

NOBODY = 65534


@pytest.fixture
def open_folder():
    """A folder that others than its owner can reach, unlike pytest's."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for folder in (path, *(p for p in path.rglob("*") if p.is_dir())):
        folder.chmod(0o755)
    shutil.rmtree(path)


def test_full_at_any_size_of_file(warm, tmp_path):
    """No file can grow beyond so many bytes: the first to fail is in turn one of the data, the run folder, a checkpoint
    and the export. Afterwards the run is the straight one's, bit for bit."""
    base = tiny.save_tiny(tmp_path / "base")
    straight = warm.attempt(recipe_of("diffusion", base, tmp_path, "straight"), tmp_path / "cache-straight")
    assert straight["code"] == 0, straight["said"]
    run = tmp_path / "runs" / "full"
    recipe = recipe_of("diffusion", base, tmp_path, "full")
    last = None
    for size in (0, 2_000, 12_000, 40_000, 200_000):
        done = warm.attempt(recipe, tmp_path / "cache-full", max_file=size)
        assert "Traceback" not in done["said"], done["said"]
        assert done["code"] in (0, 2), done["said"]
        if done["code"] == 2:
            assert "error:" in done["said"]
            last = done["said"]
    assert last is not None
    end = warm.attempt(recipe, tmp_path / "cache-full")
    assert end["code"] == 0, end["said"]
    assert not differences(run, tmp_path / "runs" / "straight")
    assert not [p for p in run.rglob("*") if ".partial" in p.name or p.name.endswith(".new")]


def test_full_for_two_ranks(warm, tmp_path):
    """Both say so and end with 2: a job that is started again where a rank is lost is not started again for this."""
    base = tiny.save_tiny(tmp_path / "base")
    recipe = recipe_of("ranks", base, tmp_path, "full")
    for size in (30_000, 200_000):
        done = warm.attempt(recipe, tmp_path / "cache", ranks=2, max_file=size)
        assert "Traceback" not in done["said"]
        assert done["code"] == 2, done["said"]
        assert done["codes"][1] in (0, 2), done["said"]
        assert "error:" in done["said"]
        assert "does not answer" not in done["said"]
    done = warm.attempt(recipe, tmp_path / "cache", ranks=2)
    assert done["codes"] == [0, 0], done["said"]


@pytest.mark.parametrize("place", ["runs", "cache", "runs/readonly/checkpoints"])
def test_a_folder_that_cannot_be_written(place, warm, open_folder):
    base = tiny.save_tiny(open_folder / "base")
    recipe = recipe_of("diffusion", base, open_folder, "readonly")
    for name in ("runs", "cache"):
        (open_folder / name).mkdir()
    if place.endswith("checkpoints"):
        stopped = recipe | {"trainer": {**recipe["trainer"], "max_time": "00:00:00"}}
        assert warm.attempt(stopped, open_folder / "cache")["code"] == 75
    for path in open_folder.rglob("*"):
        path.chmod(0o777 if path.is_dir() else 0o666)
    before = sorted(p.name for p in (open_folder / place).iterdir())
    (open_folder / place).chmod(0o555)
    user = {"user": NOBODY} if os.geteuid() == 0 else {}  # root may write anywhere
    done = warm.attempt(recipe, open_folder / "cache", **user)
    assert done["code"] == 2, done["said"]
    assert "Traceback" not in done["said"]
    assert str(open_folder / place) in done["said"]
    assert sorted(p.name for p in (open_folder / place).iterdir()) == before
    (open_folder / place).chmod(0o777)
    done = warm.attempt(recipe, open_folder / "cache")
    assert done["code"] == 0, done["said"]
