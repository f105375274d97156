"""`adapt health` finds what would end a run later, and says on which rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

from adapt import cli
from adapt.distributed import health
from tests.recipes import tiny_recipe

ROOT = Path(__file__).parents[2]


def test_a_machine_that_is_well(tmp_path, capsys):
    assert cli.main(["health", "--dir", str(tmp_path / "runs"), "--disk=0.001"]) == 0
    shown = capsys.readouterr().out
    assert "healthy: 1 rank(s)" in shown
    assert "torch" in shown
    assert f"host {socket.gethostname()}" in shown
    assert list((tmp_path / "runs").iterdir()) == [], "nothing is left behind"


def test_the_disk_is_that_of_the_recipes_runs(tiny_base, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe(tiny_base, tmp_path)))
    assert cli.main(["health", "--disk=1e9", "-c", str(file), f"run.dir={tmp_path / 'elsewhere'}"]) == 1
    assert f"{tmp_path / 'elsewhere'} has" in capsys.readouterr().out
    assert cli.main(["health", "-c", str(file), "run.folder=x"]) == 2


def test_a_disk_that_is_too_small_or_cannot_be_written(tmp_path, capsys):
    assert cli.main(["health", "--dir", str(tmp_path), "--disk=1e9"]) == 1
    assert "GiB of room, and 1e+09 were asked for" in capsys.readouterr().out
    (tmp_path / "runs").write_text("a file")
    assert cli.main(["health", "--dir", str(tmp_path / "runs")]) == 1
    assert "cannot be written" in capsys.readouterr().out


def test_ranks_with_other_versions_are_told(capsys):
    hardware = {"gpus": [], "cores": 2, "memory_gib": 8}
    reports = [
        {"rank": r, "host": f"n{r}", "device": "cpu", "versions": {"torch": v}, "git": None, "hardware": hardware}
        | {"problems": []}
        for r, v in enumerate(("2.13", "2.13", "2.12"))
    ]
    health._tell(reports)
    shown = capsys.readouterr().out
    assert "ranks have different versions" in shown
    assert "[0, 1]" in shown
    assert "healthy" not in shown


def test_two_ranks_meet_and_a_folder_that_they_do_not_share_is_found(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    ranks = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "adapt", "health", "--disk=0.001"]
        ranks.append(
            subprocess.Popen(command, cwd=tmp_path / str(rank), env=environment, stdout=subprocess.PIPE, text=True)
        )
    shown, _ = ranks[0].communicate(timeout=200)
    ranks[1].communicate(timeout=200)
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "all-reduce of 4 MiB over 2 ranks" in shown
    assert f"error: rank 1 (host {socket.gethostname()})" in shown
    assert "is not the folder that rank 0 sees" in shown
