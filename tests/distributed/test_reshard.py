"""Checkpoints in the layout of other ranks: the same tensors, each rank's rows in a file of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from adapt.cli import main
from adapt.config import resolve
from adapt.distributed import checkpoint
from adapt.distributed.checksums import damage
from adapt.distributed.reshard import reshard
from adapt.distributed.world import World
from adapt.errors import StopRequested, UserError
from adapt.train.fit import fit
from tests.distributed.test_saver import HERE, assert_equal, contents, loaded, made, step
from tests.ranks import on_ranks
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, stop_after


@pytest.fixture
def saved(tmp_path) -> Path:
    root, optimizer = made()
    step(root, optimizer)
    return checkpoint.save(tmp_path / "one", 1, root, optimizer, {"step": 1}, HERE)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 100])
def test_no_value_changes_whatever_the_number_of_ranks(ranks, saved, tmp_path):
    path = reshard(saved, tmp_path / "many", ranks)
    assert path == tmp_path / "many" / "step-1"
    assert damage(path) == ""
    assert checkpoint.read_state(path) == {"step": 1}
    assert len(list(path.glob("*.distcp"))) == min(ranks, 7), "rows of the longest tensor, in equal chunks"
    assert_equal(loaded(path), loaded(saved))


def test_there_and_back_is_the_same(saved, tmp_path):
    back = reshard(reshard(saved, tmp_path / "five", 5), tmp_path / "back", 1)
    assert_equal(loaded(back), loaded(saved))


def read_own_file(folder: str, whole: str) -> None:
    """What a rank needs of a sharded tensor lies in its own file."""
    path, rank = Path(folder), dist.get_rank()
    wanted = torch.load(whole)
    root, optimizer = made()
    for other in path.glob("*.distcp"):
        assert other.stat().st_size > 0
    checkpoint.load(path, root, optimizer)
    assert_equal(contents(root, optimizer), wanted)
    weight = dict(root.named_parameters())["student.0.weight"]
    index = checkpoint.Reader(str(path)).read_metadata()
    rows = list(index.state_dict_metadata["model/student.0.weight"].chunks)
    assert rows[rank].sizes == weight.to_local().shape
    places = {i.offset: info.relative_path for i, info in index.storage_data.items() if i.fqn.endswith("0.weight")}
    assert places[rows[rank].offsets] == f"__{rank}_0.distcp"
    world = World(rank, rank, dist.get_world_size(), 1, torch.device("cpu"))
    checkpoint.save(path.parent, 9, root, optimizer, {}, world)


def test_ranks_find_their_rows_in_their_own_files(saved, tmp_path):
    """And what three of them save is read back by one, and made into files for two."""
    path = reshard(saved, tmp_path / "three", 3)
    torch.save(loaded(saved), tmp_path / "whole")
    on_ranks(3, tmp_path, read_own_file, str(path), str(tmp_path / "whole"))
    assert_equal(loaded(reshard(tmp_path / "three" / "step-9", tmp_path / "two", 2)), loaded(saved))


def test_what_is_there_is_left_alone(saved, tmp_path):
    with pytest.raises(UserError, match="is there already"):
        reshard(saved, saved.parent, 2)
    assert damage(saved) == ""


def test_a_run_goes_on_from_its_resharded_checkpoint(tiny_base, tmp_path, capsys):
    """`adapt export RUN --to DIR --reshard 2`, put in its place: the run ends as the one that was not interrupted."""
    for name in ("straight", "resharded"):
        recipe = tiny_recipe(tiny_base, tmp_path, run={"name": name})
        if name == "straight":
            fit(resolve(recipe))
    with pytest.MonkeyPatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 3)
        fit(resolve(recipe))
    run = tmp_path / "runs" / "resharded"
    assert main(["export", str(run), "--to", str(tmp_path / "new"), "--reshard", "2"]) == 0
    assert str(tmp_path / "new" / "step-3") in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints" / "step-3")
    shutil.move(tmp_path / "new" / "step-3", run / "checkpoints" / "step-3")
    assert fit(resolve(recipe), "yes") == 0
    assert_same_run(run, tmp_path / "runs" / "straight")


def test_what_makes_no_sense_is_refused_all_at_once(tmp_path, capsys):
    argv = ["export", str(tmp_path), "--to", str(tmp_path / "x"), "--reshard", "0", "--dtype", "float16"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "--reshard" in said
    assert "--dtype" in said
