"""The optimizer that trainers see: AdamW bit for bit, state from the start, and state that goes on or is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from adapt.components import optimizers
from adapt.config import resolve
from adapt.distributed import checkpoint
from adapt.distributed.world import World
from adapt.errors import StopRequested, UserError
from adapt.train.fit import fit
from adapt.train.root import Root
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, launch, losses, poison, stop_after, weights

COSMOS = {"name": "cosmos", "lr": 1e-3, "rank": 8}


def built(model, name="cosmos", **fields):
    entry = optimizers[name]
    return entry.factory(entry.config_type(**fields), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invariant_17_adamw_is_torchs_bit_for_bit(dtype):
    """With decay, and a parameter that now and then has no gradient."""
    ours, theirs = (tiny.tiny_model("qwen2", dtype=dtype) for _ in range(2))
    optimizer = built(ours, "adamw", lr=1e-3, weight_decay=0.1)
    decayed = {n for g in optimizer.param_groups if g["weight_decay"] for n in g["names"]}
    named = dict(theirs.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    other = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    maker = torch.Generator().manual_seed(0)
    for step in range(5):
        for name, p in ours.named_parameters():
            p.grad = torch.randn(p.shape, generator=maker).to(dtype)
            if step == 2 and "q_proj" in name:
                p.grad = None
            named[name].grad = p.grad
        for group in (*optimizer.param_groups, *other.param_groups):
            group["lr"] = 1e-3 / (1 + step)
        optimizer.step()
        other.step()
    for name, p in ours.named_parameters():
        assert torch.equal(p, named[name]), name
        for key, value in other.state[named[name]].items():
            assert torch.equal(optimizer.state[p][key], value), (name, key)


@pytest.mark.parametrize("name", ["adamw", "cosmos"])
def test_all_state_is_there_before_the_first_step(name):
    model = tiny.tiny_model("qwen2")
    optimizer = built(model, name)
    before = {p: {k: (v.shape, v.dtype) for k, v in s.items()} for p, s in optimizer.state.items()}
    assert set(before) == set(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert before == {p: {k: (v.shape, v.dtype) for k, v in s.items()} for p, s in optimizer.state.items()}
    optimizer.restart()
    assert all(not v.any() for s in optimizer.state.values() for v in s.values())


def test_every_number_is_in_the_groups():
    """What the state dict carries is enough to go on."""
    model = tiny.tiny_model("qwen2")
    optimizer = built(model, rank=4, gamma=0.3, ns_steps=3)
    other = built(model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()) | {"state": {}})
    (group,) = [g for g in other.param_groups if g["role"] == "matrix"]
    assert (group["gamma"], group["ns_steps"], group["rank"]) == (0.3, 3, 4)


def test_invariant_13_runs_resume_bit_for_bit(tmp_path, monkeypatch):
    base = tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)
    over = {"optimizer": COSMOS, "evaluation": {"suites": []}}
    straight = tiny_recipe(base, tmp_path, run={"name": "straight"}, **over)
    fit(resolve(straight))
    broken = tiny_recipe(base, tmp_path, run={"name": "broken"}, **over)
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 3"):
        stop_after(patched, 3)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "broken")


def test_two_ranks_equal_one_and_resume_on_one(tiny_base, tmp_path):
    """FSDP2 through the real command: one process' trajectory within float32 noise, and a run that two ranks left goes
    on on one."""
    over = {"optimizer": {**COSMOS, "init": "svd"}, "evaluation": {"suites": []}, "generation": {"prompts": []}}
    trainer = {"steps": 3, "batch_tokens": 256, "microbatch": 1}
    one = tiny_recipe(tiny_base, tmp_path, run={"name": "one"}, trainer=trainer, **over)
    fit(resolve(one))
    for name, limit in (("two", None), ("moved", "00:00:00")):
        recipe = tiny_recipe(tiny_base, tmp_path, run={"name": name}, trainer={**trainer, "devices": 2}, **over)
        recipe["trainer"]["max_time"] = limit
        done = launch(recipe, tmp_path)
        assert done.returncode == (75 if limit else 0), done.stderr
        assert done.stdout.count("role  ") == 1, "the routing table, once"
    recipe["trainer"] |= {"devices": 1, "max_time": None}
    fit(resolve(recipe), "yes")
    runs = tmp_path / "runs"
    a, x = losses(runs / "one"), weights(runs / "one")
    for name in ("two", "moved"):
        b, y = losses(runs / name), weights(runs / name)
        assert a.keys() == b.keys()
        assert max(abs(a[s] - b[s]) for s in a) < 2e-5 * max(a.values())
        assert max((x[k] - y[k]).abs().max() for k in x) < 1e-4


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("adamw", {}, "made by 'cosmos'; 'adamw' cannot go on from it at student.model.layers.0"),
        ("cosmos", {"rank": 4}, r"basis of \(32, 8\) for student.model.layers.*cosmos needs \(32, 4\)"),
        ("cosmos", {"rank": 8}, ""),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused_by_name(name, fields, says, tmp_path):
    here = World(0, 0, 1, 1, torch.device("cpu"))
    root = Root(tiny.tiny_model("qwen2"))
    path = checkpoint.save(tmp_path, 3, root, built(root.student, rank=8), {}, here)
    optimizer = built(root.student, name, **fields)
    if not says:
        checkpoint.load(path, root, optimizer)
        return
    with pytest.raises(UserError, match=says):
        checkpoint.load(path, root, optimizer)


def test_keep_refuses_state_of_another_rank(tiny_base, tmp_path):
    stages = [{"name": "a"}, {"name": "b", "optimizer": {**COSMOS, "rank": 4}, "optimizer_state": "keep"}]
    over = {"optimizer": COSMOS, "evaluation": {"suites": []}, "trainer": {"steps": 1, "batch_tokens": 256}}
    with pytest.raises(UserError, match="optimizer_state: keep: cosmos cannot go on"):
        fit(resolve(tiny_recipe(tiny_base, tmp_path, **over) | {"stages": stages}))


def test_gradients_that_are_not_finite_touch_no_state(tiny_base, tmp_path, monkeypatch):
    """Weights and state after a poisoned step are those of before."""
    from adapt.train import module

    recipe = tiny_recipe(
        tiny_base, tmp_path, optimizer=COSMOS, evaluation={"suites": []},
        trainer={"steps": 4, "batch_tokens": 256, "non_finite": "skip"},
    )  # fmt: skip
    poison(monkeypatch, at=3)
    seen, original = [], module.Stage.training_step

    def watched(self, *args):
        original(self, *args)
        state = self.ready_optimizer.state
        seen.append([v.clone() for s in state.values() for v in s.values()])

    monkeypatch.setattr(module.Stage, "training_step", watched)
    fit(resolve(recipe))
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "runs" / "tiny").values())


def test_rewinding_to_the_start_of_a_stage_starts_the_state_again(tiny_base, tmp_path, monkeypatch):
    poison(monkeypatch, at=4)
    recipe = tiny_recipe(
        tiny_base, tmp_path, optimizer=COSMOS, evaluation={"suites": []},
        trainer={"steps": 6, "batch_tokens": 256, "non_finite": "rewind"},
    )  # fmt: skip
    fit(resolve(recipe | {"checkpoint": {"every": 2}}))
    assert "rewound to step-2" in (tmp_path / "runs" / "tiny" / "log.txt").read_text()
