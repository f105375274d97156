"""Checkpoints written while training goes on hold the step they are named after, arrive whole, or not at all."""

from __future__ import annotations

import errno
import multiprocessing
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from adapt.config import resolve
from adapt.distributed import checkpoint, saver
from adapt.distributed.checksums import damage
from adapt.distributed.saver import Saver
from adapt.distributed.world import World
from adapt.errors import UserError
from adapt.train.fit import fit
from tests.ranks import on_ranks
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, launch, losses

HERE = World(0, 0, 1, 1, torch.device("cpu"))


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = torch.nn.Sequential(torch.nn.Linear(33, 7), torch.nn.Linear(7, 1))


def made() -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(0)
    root = Small()
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(root.student, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return root, torch.optim.AdamW(root.parameters(), lr=0.1)


def step(root: Small, optimizer: torch.optim.Optimizer) -> None:
    root.student(torch.ones(2, 33)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(root: Small, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in root.named_parameters():
        for key, value in {"weight": p, **optimizer.state[p]}.items():
            found[f"{name}/{key}"] = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return found


def loaded(path: Path) -> dict[str, torch.Tensor]:
    root, optimizer = made()
    checkpoint.load(path, root, optimizer)
    return contents(root, optimizer)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def trains_on(folder: Path, world: World) -> None:
    """Both saves are held back until the weights have moved on; the second finds the first one's memory."""
    original, gate = saver.write, threading.Event()

    def held(*args):
        assert gate.wait(60)
        return original(*args)

    saver.write = held
    root, optimizer = made()
    with Saver(world) as saving:
        for number in (1, 2):
            gate.clear()
            step(root, optimizer)
            wanted = contents(root, optimizer)
            saving.save(folder, number, root, optimizer, {"step": number}, wait=False)
            step(root, optimizer)
            assert not (folder / f"step-{number}").exists()
            assert not saving.news()
            gate.set()
            saving.finish()
            (line,) = saving.news()
            assert f"step-{number} saved" in line
            assert not saving.news(), "told once"
            assert_equal(loaded(folder / f"step-{number}"), wanted)
            assert damage(folder / f"step-{number}") == ""
    saver.write = original


def trains_on_as_a_rank(folder: str) -> None:
    trains_on(Path(folder), World(dist.get_rank(), 0, dist.get_world_size(), 1, torch.device("cpu")))


def test_what_is_saved_is_what_was_there_when_training_went_on(tmp_path):
    trains_on(tmp_path, HERE)


def test_what_is_saved_is_what_was_there_on_every_rank(tmp_path):
    """Three ranks share 7 rows, so one of them has fewer."""
    on_ranks(3, tmp_path, trains_on_as_a_rank, str(tmp_path / "checkpoints"))


def test_waiting_and_training_on_write_the_same_files(tmp_path):
    root, optimizer = made()
    step(root, optimizer)
    with Saver(HERE) as saving:
        for name, wait in (("a", True), ("b", False)):
            saving.save(tmp_path / name, 1, root, optimizer, {}, wait=wait)
        saving.finish()
    a, b = (tmp_path / name / "step-1" for name in ("a", "b"))
    assert (a / "__0_0.distcp").read_bytes() == (b / "__0_0.distcp").read_bytes()
    assert_equal(loaded(a), loaded(b))


def test_then_comes_after_the_checkpoint_is_there(tmp_path):
    seen = []
    root, optimizer = made()
    with Saver(HERE) as saving:
        saving.save(
            tmp_path, 1, root, optimizer, {}, wait=False, then=lambda: seen.append((tmp_path / "step-1").is_dir())
        )
    assert seen == [True], "the end of the context waits for it"


def fill_disk(monkeypatch, *, from_save: int) -> None:
    saves = []

    def full(folder, sums):
        saves.append(folder)
        if len(saves) >= from_save:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, sums)

    original = checkpoint.put_sums
    monkeypatch.setattr(checkpoint, "put_sums", full)


def test_a_save_that_fails_meanwhile_is_told_and_leaves_the_one_before(tmp_path, monkeypatch):
    fill_disk(monkeypatch, from_save=2)
    root, optimizer = made()
    with Saver(HERE) as saving:
        saving.save(tmp_path, 1, root, optimizer, {}, wait=False)
        saving.save(tmp_path, 2, root, optimizer, {}, wait=False)
        with pytest.raises(UserError, match=r"step 2 could not be written .*No space left.*\n.* --resume"):
            saving.finish()
        saving.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def fail_on_one(folder: str) -> None:
    rank = dist.get_rank()
    if rank == 1:
        checkpoint.SummingWriter.sums = property(
            lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        )
    world = World(rank, 0, dist.get_world_size(), 1, torch.device("cpu"))
    with Saver(world) as saving:
        saving.save(Path(folder), 1, *made(), {}, wait=False)
        with pytest.raises(UserError, match=r"Input/output error"):
            saving.finish()
    dist.barrier()
    assert not list(Path(folder).iterdir())


def test_where_one_rank_fails_all_ranks_say_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    on_ranks(2, tmp_path, fail_on_one, str(tmp_path / "checkpoints"))


def hang(folder: Path, marker: Path) -> None:
    """Saves step 1, then is never done with step 2."""
    root, optimizer = made()
    with Saver(HERE) as saving:
        saving.save(folder, 1, root, optimizer, {}, wait=True)

        def never(*_):
            marker.touch()
            time.sleep(600)

        checkpoint.put_sums = never
        saving.save(folder, 2, root, optimizer, {}, wait=False)
        saving.finish()


def test_killed_while_a_checkpoint_is_written_the_one_before_is_whole(tmp_path):
    folder, marker = tmp_path / "checkpoints", tmp_path / "writing"
    process = multiprocessing.get_context("spawn").Process(target=hang, args=(folder, marker))
    process.start()
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()
    assert sorted(p.name for p in folder.iterdir()) == [".partial-step-2", "step-1"]
    checkpoint.recover(folder)
    assert [p.name for p in folder.iterdir()] == ["step-1"]
    assert damage(folder / "step-1") == ""


def test_a_run_that_trains_on_is_the_run_that_waits(tiny_base, tmp_path):
    """Losses, weights and every tensor of every checkpoint, bit for bit."""
    for name, asynchronous in (("on", True), ("waits", False)):
        recipe = tiny_recipe(tiny_base, tmp_path, run={"name": name})
        fit(resolve(recipe | {"checkpoint": {"every": 1, "keep": 9, "asynchronous": asynchronous}}))
    on, waits = tmp_path / "runs" / "on", tmp_path / "runs" / "waits"
    assert_same_run(on, waits)
    names = [p.name for p in checkpoint.checkpoints(on / "checkpoints")]
    assert names == [p.name for p in checkpoint.checkpoints(waits / "checkpoints")]
    assert len(names) == 6
    for name in names:
        a, b = ((run / "checkpoints" / name / "__0_0.distcp").read_bytes() for run in (on, waits))
        assert a == b
    assert "of which training waited" in (on / "log.txt").read_text()
    assert "of which training waited" not in (waits / "log.txt").read_text()


def test_a_full_disk_ends_the_run_within_a_few_steps(tiny_base, tmp_path, monkeypatch):
    """Not at the next checkpoint, which may be hours away."""
    fill_disk(monkeypatch, from_save=1)
    from adapt.train import module

    original = module.gradients

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "gradients", slow)
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 1000, "batch_tokens": 256})
    recipe["evaluation"] = {}
    with pytest.raises(UserError, match="step 20 could not be written"):
        fit(resolve(recipe | {"checkpoint": {"every": 20}}))
    assert max(losses(tmp_path / "runs" / "tiny")) < 40


def test_minutes_alone_make_checkpoints_and_the_ranks_agree_on_them(tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 4, "batch_tokens": 256, "devices": 2})
    recipe |= {"checkpoint": {"every_minutes": 1e-9, "keep": 9}, "evaluation": {}}
    done = launch(recipe, tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    assert [p.name for p in checkpoint.checkpoints(run / "checkpoints")] == ["step-1", "step-2", "step-3", "step-4"]
    assert all(damage(p) == "" for p in checkpoint.checkpoints(run / "checkpoints"))


def test_minutes_must_be_more_than_none(tiny_base, tmp_path):
    from adapt.train.rules import core_problems

    recipe = resolve(tiny_recipe(tiny_base, tmp_path) | {"checkpoint": {"every_minutes": 0.0}}).recipe
    assert "checkpoint.every_minutes" in [problem.where for problem in core_problems(recipe, 0)]
