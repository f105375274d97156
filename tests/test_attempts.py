"""One attempt at a time trains in a run folder; one that was given up for dead can write nothing there any more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adapt import attempts
from adapt.attempts import Attempt, claim, history
from adapt.config import resolve
from adapt.distributed import checkpoint
from adapt.distributed.world import World
from adapt.errors import StopRequested, Superseded, UserError
from adapt.export import export_folder
from adapt.export.weights import Whole
from adapt.runfolder import RunFolder
from adapt.train.fit import fit
from adapt.train.root import Root
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import stop_after

HERE = World(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture
def alive():
    """Another process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def begun(run, **changes) -> None:
    """An attempt of somebody else, without an end."""
    place = run / attempts.FOLDER
    place.mkdir(parents=True, exist_ok=True)
    record = {"began": "2026-01-02T03:04:05+0000"} | attempts.me() | changes
    (place / f"{attempts.newest_of(place) + 1}.json").write_text(json.dumps(record))


def test_a_second_run_in_the_folder_is_refused_by_name(tmp_path, alive):
    begun(tmp_path, host=attempts.me()["host"], pid=alive.pid, process_began=attempts.started(alive.pid))
    with pytest.raises(UserError) as error:
        claim(tmp_path)
    for word in (str(tmp_path), attempts.me()["host"], f"pid {alive.pid}", "2026-01-02T03:04:05", "kill -TERM"):
        assert word in str(error.value)
    assert len(history(tmp_path)) == 1, "who is refused leaves no mark"


def test_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path, alive):
    begun(tmp_path, pid=alive.pid, process_began=attempts.started(alive.pid))
    alive.kill()
    alive.wait()
    assert claim(tmp_path).generation == 2
    assert history(tmp_path)[1]["took_over"] == "its process was gone"


def test_a_process_that_only_has_the_number_of_the_dead_one_holds_nothing(tmp_path, alive):
    begun(tmp_path, pid=alive.pid, process_began=attempts.started(alive.pid) - 3600)
    assert claim(tmp_path).generation == 2


def test_a_slurm_job_started_again_takes_over_from_itself(tmp_path, alive, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    mine = {"pid": alive.pid, "process_began": attempts.started(alive.pid)}
    begun(tmp_path, slurm_job="17", slurm_restarts=0, **mine)
    with pytest.raises(UserError, match="scancel 17"):
        claim(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert claim(tmp_path).generation == 2
    begun(tmp_path, slurm_job="18", slurm_restarts=0, **mine)
    with pytest.raises(UserError, match="SLURM job 18"):
        claim(tmp_path)


def test_on_another_machine_only_signs_of_life_count(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attempts, "SILENT", 1.0)
    begun(tmp_path, host="elsewhere")
    file = tmp_path / attempts.FOLDER / "1.json"
    stop = threading.Event()

    def live():
        while not stop.wait(0.05):
            os.utime(file)

    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(UserError, match="host elsewhere"):
            claim(tmp_path)
    finally:
        stop.set()
        other.join()
    assert claim(tmp_path).generation == 2
    assert history(tmp_path)[1]["took_over"] == "it was silent for 1 s"
    assert "host elsewhere" in capsys.readouterr().err


def test_an_attempt_shows_that_it_lives_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "BEAT", 0.02)
    attempt = claim(tmp_path)
    attempt.step = 5
    file = tmp_path / attempts.FOLDER / "1.json"
    while json.loads(file.read_text())["step"] != 5:
        time.sleep(0.01)
    attempt.end(75, "stopped")
    attempt.end(0, "not again")
    last = history(tmp_path)[0]
    assert (last["code"], last["reason"], last["step"]) == (75, "stopped", 5)
    assert claim(tmp_path).generation == 2
    assert "took_over" not in history(tmp_path)[1]


def test_no_two_attempts_get_the_same_generation(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: claim(tmp_path).generation, range(40)))
    assert sorted(taken) == list(range(1, 41))


@pytest.fixture
def old_and_new(tmp_path):
    """(an orphan's view of a run folder, that of the attempt after it, the recipe)"""
    base = tiny.save_tiny(tmp_path / "base")
    resolved = resolve(tiny_recipe(base, tmp_path))
    old = RunFolder.create(resolved)
    old.begin(resolved)
    new = RunFolder.create(resolved, "auto")
    new.begin(resolved)
    return old, new, resolved


def everything(folder: RunFolder) -> dict[str, bytes]:
    return {
        str(p): p.read_bytes() for p in sorted(folder.path.rglob("*")) if p.is_file() and p.parent.name != "attempts"
    }


def test_an_orphan_can_write_nothing(old_and_new, tokenizer):
    """Settings, log, tables, metrics, checkpoints of any rank, exports: all refused, and nothing has changed."""
    old, new, resolved = old_and_new
    root = Root(tiny.tiny_model())
    checkpoint.save(new.checkpoints, 1, root, None, {}, HERE, attempt=new.attempt)
    before = everything(new)
    follower = Attempt(old.path, old.attempt.generation)
    writes = {
        "json": lambda: old.write_json("data.json", {}),
        "config": lambda: old.write_config(resolved),
        "log": lambda: old.log("a line"),
        "grid": lambda: old.add_grid(1, {}),
        "checkpoint": lambda: checkpoint.save(old.checkpoints, 1, root, None, {}, HERE, attempt=old.attempt),
        "shard": lambda: checkpoint.save(old.checkpoints, 2, root, None, {}, HERE, attempt=follower),
        "export": lambda: export_folder(
            Whole(root.student), tokenizer, old.export, recipe=resolved.recipe, resolved_yaml="", results={}, provenance={},
            check=old.guard,
        ),
    }  # fmt: skip
    for what, write in writes.items():
        with pytest.raises(Superseded, match="taken over by pid"):
            write()
        assert everything(new) == before, what
    new.log("the new one still can")


def test_an_orphan_that_is_in_the_middle_of_a_checkpoint_cannot_finish_it(old_and_new, monkeypatch):
    """It had begun when it still might."""
    old, new, _ = old_and_new
    root, original = Root(tiny.tiny_model()), checkpoint.put

    def late(path, text):
        digest = original(path, text)
        if path.name == checkpoint.STATE:
            Attempt(new.path, claim(new.path).generation)
            checkpoint.recover(new.checkpoints)
        return digest

    (old.path / attempts.FOLDER / "2.json").unlink()
    with monkeypatch.context() as patched, pytest.raises(Superseded):
        patched.setattr(checkpoint, "put", late)
        checkpoint.save(old.checkpoints, 1, root, None, {}, HERE, attempt=old.attempt)
    assert os.listdir(new.checkpoints) == []


def test_a_run_superseded_while_it_trains_logs_no_further_step(tiny_base, tmp_path, monkeypatch):
    from adapt.train import module

    recipe = tiny_recipe(tiny_base, tmp_path)
    original, steps = module.gradients, []

    def gradients(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            claim(tmp_path / "runs" / "tiny")
        return original(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Superseded):
        patched.setattr(module, "gradients", gradients)
        fit(resolve(recipe))
    run = tmp_path / "runs" / "tiny"
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2]
    assert checkpoint.checkpoints(run / "checkpoints") == []
    assert history(run)[0]["code"] == 1


def test_the_history_of_attempts_is_kept_and_shown(tiny_base, tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 2)
        fit(resolve(recipe))
    fit(resolve(recipe), "yes")
    run = tmp_path / "runs" / "tiny"
    first, second = history(run)
    assert (first["code"], first["from_step"], first["step"]) == (75, 0, 2)
    assert "after step 2" in first["reason"]
    assert (second["code"], second["from_step"], second["step"], second["reason"]) == (0, 2, 6, "done")
    page = (run / "report.html").read_text()
    section = page[page.index('<section id="attempts">') :]
    assert "2 to 6" in section
    assert "after step 2" in section
    assert "killed, or lost" not in section
