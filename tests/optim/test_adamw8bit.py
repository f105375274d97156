"""AdamW in 8 bits: what is quantised and in which blocks, how close it stays to AdamW, resumed, and on two ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from adapt.components import optimizers
from adapt.config import resolve
from adapt.distributed import checkpoint
from adapt.distributed.world import World
from adapt.errors import StopRequested, UserError
from adapt.optim import adamw8bit
from adapt.optim.algorithms.adamw8bit import block_of
from adapt.optim.state_bytes import state_bytes
from adapt.train.fit import fit
from adapt.train.root import Root
from adapt.train.validate import problems
from tests import tiny
from tests.ranks import on_ranks
from tests.recipes import tiny_recipe
from tests.train.test_fit import ROOT, assert_same_run, stop_after

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def built(model, name="adamw8bit", **fields):
    entry = optimizers[name]
    return entry.factory(entry.config_type(lr=1e-2, **fields), model)


def gradients(model, step: int) -> None:
    """The same on any number of ranks."""
    maker = torch.Generator().manual_seed(step)
    for p in model.parameters():
        whole = torch.randn(p.shape, generator=maker) * 10 ** torch.randn((), generator=maker)
        p.grad = whole if not hasattr(p, "placements") else sharded(whole, p)


def sharded(whole, like):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def test_without_torchao_the_letter_has_the_command(tmp_path, tiny_base, monkeypatch):
    monkeypatch.setattr(adamw8bit, "find_spec", lambda name: None)
    recipe = tiny_recipe(tiny_base, tmp_path, optimizer={"name": "adamw8bit", "block_size": 48})
    found = {p.where: p.what for p in problems(resolve(recipe))}
    assert "pip install 'adapt-lm[lowbit]'" in found["optimizer.name"]
    assert "power of two" in found["optimizer.block_size"]
    with pytest.raises(UserError, match="torchao"):
        built(nn.Linear(4, 4))


def test_compiled_steps_take_no_schedules(tmp_path, tiny_base):
    recipe = tiny_recipe(tiny_base, tmp_path, optimizer={"name": "adamw8bit", "compile": True})
    recipe["optimizer_schedules"] = {"beta1": {"schedule": "constant"}}
    assert "optimizer.compile" in {p.where for p in problems(resolve(recipe))}


def test_an_installed_torchao_says_nothing_to_users():
    pytest.importorskip("torchao")
    code = "from adapt.cli import main; main(['recipes']); from transformers.models.llama import modeling_llama"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "shape, largest, block",
    [
        ((64, 576), 256, 64),  # 576 = 9 x 64
        ((64, 4096), 256, 256),
        ((64, 4096), 2048, 2048),
        ((128, 896), 64, 64),
        ((8, 1024, 96), 256, 256),  # experts: a row is a whole matrix
        ((4096, 33), 256, None),
        ((64, 63), 256, None),
        ((63, 64), 256, None),  # below 4096 values
        ((8192,), 256, None),
    ],
)
def test_blocks_end_where_rows_end(shape, largest, block):
    assert block_of(torch.empty(shape, device="meta"), largest) == block


def test_moments_take_a_byte_each():
    pytest.importorskip("torchao")
    model = nn.Linear(512, 256)
    optimizer = built(model)
    values, rest = 256 * 512, 2 * (256 * 4 + 4)
    expected = 2 * (values + 4 * values / 256 + 4 * 256) + rest
    assert state_bytes(optimizer) == expected
    assert expected < 0.27 * state_bytes(built(nn.Linear(512, 256), "adamw")), "a quarter of AdamW's, and the scales"


def test_close_to_adamw():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    low, full = nn.Linear(128, 64), nn.Linear(128, 64)
    full.load_state_dict(low.state_dict())
    start = low.weight.detach().clone()
    optimizers_ = built(low, weight_decay=0.1), built(full, "adamw", weight_decay=0.1)
    for step in range(20):
        for model, optimizer in zip((low, full), optimizers_, strict=True):
            gradients(model, step)
            optimizer.step()
    moved, expected = low.weight - start, full.weight - start
    assert torch.linalg.norm(moved - expected) < 0.05 * torch.linalg.norm(expected)
    assert not torch.equal(moved, expected), "it would not be in 8 bits"
    torch.testing.assert_close(low.bias, full.bias, rtol=1e-5, atol=1e-7)  # too small to be quantised


@pytest.mark.slow
def test_compiled_is_the_same_step():
    """But for the order of additions; the rate changes without another compilation."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    one, two = nn.Linear(128, 64, bias=False), nn.Linear(128, 64, bias=False)
    two.load_state_dict(one.state_dict())
    both = built(one, weight_decay=0.1), built(two, weight_decay=0.1, compile=True)
    for step in range(4):
        for model, optimizer in zip((one, two), both, strict=True):
            gradients(model, step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.step()
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_learns_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    base = tiny.save_tiny(tmp_path / "base", attention_dropout=0.2, **WIDE)

    def recipe(name):
        made = tiny_recipe(base, tmp_path, run={"name": name}, objective="next_token", optimizer=low)
        return resolve(made | {"model": {"base": str(base)}, "generation": {}, "evaluation": {}})

    low = {"name": "adamw8bit", "lr": 1e-2, "weight_decay": 0.1}
    fit(recipe("straight"))
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 3"):
        stop_after(patched, 3)
        fit(recipe("broken"))
    fit(recipe("broken"), "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "broken")
    low = low | {"name": "adamw"}
    with pytest.raises(UserError, match=r"optimizer\.name"):
        fit(recipe("broken"), "yes")


def small() -> nn.Module:
    return tiny.tiny_model("qwen2", **WIDE)


STEPS = 3


def on_two(folder) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = World(dist.get_rank(), dist.get_rank(), 2, 2, torch.device("cpu"))
    root = Root(small())
    fully_shard(root, mesh=init_device_mesh("cpu", (2,)))
    optimizer = built(root.student, weight_decay=0.1)
    for step in range(STEPS):
        gradients(root.student, step)
        optimizer.step()
    checkpoint.save(folder, STEPS, root, optimizer, {}, world)
    again = Root(small())
    fully_shard(again, mesh=init_device_mesh("cpu", (2,)))
    loaded = built(again.student, weight_decay=0.1)
    checkpoint.load(folder / f"step-{STEPS}", again, loaded)
    for (name, a), b in zip(root.student.named_parameters(), again.student.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local()), name
        for key, value in optimizer.state[a].items():
            assert same(value, loaded.state[b][key]), (name, key)


def same(a, b) -> bool:
    from adapt.optim.state_bytes import plain_tensors

    return type(a) is type(b) and all(
        torch.equal(x, y) for x, y in zip(plain_tensors(a), plain_tensors(b), strict=True)
    )


def test_two_ranks_are_one_and_their_checkpoint_is_read_by_one(tmp_path):
    """Bit for bit: blocks do not depend on where the rows are."""
    pytest.importorskip("torchao")
    on_ranks(2, tmp_path, on_two, tmp_path)
    alone, loaded = Root(small()), Root(small())
    optimizer, resumed = built(alone.student, weight_decay=0.1), built(loaded.student, weight_decay=0.1)
    for step in range(STEPS):
        gradients(alone.student, step)
        optimizer.step()
    checkpoint.load(tmp_path / f"step-{STEPS}", loaded, resumed)
    for (name, a), b in zip(alone.student.named_parameters(), loaded.student.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state[a].items():
            assert same(value, resumed.state[b][key]), (name, key)
    kinds = {type(s["exp_avg"]).__name__ for s in optimizer.state.values()}
    assert kinds == {"OptimState8bit", "Tensor"}
