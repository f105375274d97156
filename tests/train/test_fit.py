"""Runs through the real entry points: straight = interrupted + resumed, 2 ranks = 1, stages, export, bad endings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from adapt.config import resolve
from adapt.distributed import checkpoint
from adapt.errors import StopRequested, UserError
from adapt.train.fit import fit
from tests import tiny
from tests.recipes import tiny_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dropout_base(tmp_path):
    """Dropout on: a resumed run must draw the same masks."""
    return tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_run(a: Path, b: Path) -> None:
    """Every loss and every weight, bit for bit."""
    assert losses(a) == losses(b)
    left, right = weights(a), weights(b)
    assert all(torch.equal(left[k], right[k]) for k in left)


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "export" / "model.safetensors")


def stop_after(monkeypatch, step: int) -> None:
    """Ask the run to stop while it makes this step, as a signal would."""
    from adapt.train import module

    original = module.gradients

    def gradients(*args, **kwargs):
        kwargs["stop"] = kwargs["stop"] or gradients.calls == step
        gradients.calls += 1
        return original(*args, **kwargs)

    gradients.calls = 1
    monkeypatch.setattr(module, "gradients", gradients)


def launch(recipe: dict, folder: Path, *args: str, **kwargs) -> subprocess.CompletedProcess:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return subprocess.run(
        [sys.executable, "-m", "adapt", "fit", "-c", str(path), *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


def test_a_run_leaves_everything_a_user_wants(dropout_base, tmp_path, capsys):
    recipe = tiny_recipe(dropout_base, tmp_path)
    assert fit(resolve(recipe)) == 0
    run = tmp_path / "runs" / "tiny"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "log.txt", "report.html", "data.json"):
        assert (run / name).is_file(), name
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["block_size"] for line in lines if "block_size" in line] == [2, 2, 4, 4, 8, 8]
    assert all(any(k.startswith(f"eval/{m}") for line in lines for k in line) for m in ("bpb", "masked_ce"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "export")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config.block_size, model.config.mask_token_id) == (8, 3)
    assert AutoTokenizer.from_pretrained(run / "export").mask_token_id == 3
    shown = capsys.readouterr().out
    assert "tokens per forward" in shown
    assert "exported model" in shown
    with pytest.raises(UserError, match="--resume"):
        fit(resolve(recipe))


def test_interrupted_and_resumed_is_bit_exact(dropout_base, tmp_path, monkeypatch):
    """Mid-epoch, mid-plateau, dropout on, microbatches: the same losses and the same final weights."""
    straight = tiny_recipe(dropout_base, tmp_path, run={"name": "straight"})
    fit(resolve(straight))
    broken = tiny_recipe(dropout_base, tmp_path, run={"name": "broken"})
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 3"):
        stop_after(patched, 3)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    runs = tmp_path / "runs"
    assert losses(runs / "straight") == losses(runs / "broken")
    expected, found = weights(runs / "straight"), weights(runs / "broken")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_two_stages_resume_inside_the_second(dropout_base, tmp_path, monkeypatch):
    suites = {
        "evaluation": {"suites": ["bpb", {"name": "masked_ce", "block_size": 8}], "limit": 2},
        "generation": {"prompts": ["the"], "samplers": [{"name": "block_diffusion", "block_size": 8}]},
    }
    stages = [
        {"name": "ar", "objective": {"name": "next_token"}, "trainer": {"steps": 2}},
        {"name": "blocks", "trainer": {"steps": 4}, "optimizer_state": "keep"},
    ]
    straight = tiny_recipe(dropout_base, tmp_path, run={"name": "straight"}) | suites | {"stages": stages}
    fit(resolve(straight))
    broken = tiny_recipe(dropout_base, tmp_path, run={"name": "broken"}) | suites | {"stages": stages}
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 4"):
        stop_after(patched, 4)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "broken")


@pytest.mark.parametrize(("every", "steps"), [(None, [0, 4]), (3, [0, 2, 4])])
def test_a_run_that_evaluates_on_its_way_does_so_at_the_end_of_each_stage(every, steps, tiny_base, tmp_path):
    stages = [{"name": name, "objective": "next_token", "trainer": {"steps": 2}} for name in ("a", "b")]
    fit(
        resolve(
            tiny_recipe(
                tiny_base, tmp_path, evaluation={"every": every, "suites": ["bpb"]}, generation={"samplers": ["ar"]}
            )
            | {"stages": stages}
        )
    )
    lines = map(json.loads, (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if any(k.startswith("eval/bpb") for k in line)] == steps


@pytest.mark.parametrize(("tied", "packing", "offload"), [(True, "windows", False), (False, "best_fit", True)])
def test_two_ranks_equal_one_and_resume_on_one(tied, packing, offload, tmp_path):
    """FSDP2 on two gloo processes: the same trajectory as one process within float32 noise, although rows with padding
    give the ranks different numbers of targets; a run stopped on two ranks goes on on one."""
    base = tiny.save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    one = tiny_recipe(base, tmp_path, run={"name": "one"}, data={"packing": packing})
    assert launch(one, tmp_path).returncode == 0
    two = tiny_recipe(base, tmp_path, run={"name": "two"}, trainer={"devices": 2, "steps": 6})
    two["data"] |= {"packing": packing}
    two["trainer"] |= {"max_time": None, "microbatch": 1, "mesh": {"offload": offload}}
    done = launch(two, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("attention: ") == 1, "what is true of all ranks is said once"
    runs = tmp_path / "runs"
    a, b = losses(runs / "one"), losses(runs / "two")
    assert a.keys() == b.keys()
    assert max(abs(a[s] - b[s]) for s in a) < 2e-5 * max(a.values())  # sums in another order, float32
    x, y = weights(runs / "one"), weights(runs / "two")
    assert max((x[k] - y[k]).abs().max() for k in x) < 1e-4
    stopped = two | {"run": {**two["run"], "name": "moved"}}
    stopped["trainer"] = {**two["trainer"], "max_time": "00:00:00"}
    assert launch(stopped, tmp_path).returncode == 75
    stopped["trainer"] = {**two["trainer"], "devices": 1, "max_time": None, "mesh": {}}
    moved = launch(stopped, tmp_path, "--resume")
    assert moved.returncode == 0, moved.stderr
    c = losses(runs / "moved")
    assert c.keys() == a.keys()
    assert max(abs(a[s] - c[s]) for s in a) < 2e-5 * max(a.values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_save_and_exit_75(number, tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 100000, "batch_tokens": 256, "microbatch": 4})
    recipe["evaluation"] = {}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    process = subprocess.Popen(
        [sys.executable, "-m", "adapt", "fit", "-c", str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    process.stdout.read()
    assert process.wait(120) == 75
    saved = checkpoint.checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")
    assert len(saved) == 1
    assert checkpoint.read_state(saved[0])["step"] >= 3


def poison(monkeypatch, at: int) -> None:
    """A loss that is not a number at one step."""
    from adapt.objectives.block_diffusion import BlockDiffusion
    from adapt.train import module

    original = module.gradients
    call = BlockDiffusion.__call__

    def gradients(*args, **kwargs):
        gradients.calls += 1
        with monkeypatch.context() as inner:
            if gradients.calls == at:
                inner.setattr(BlockDiffusion, "__call__", lambda *a: {k: v * float("nan") for k, v in call(*a).items()})
            return original(*args, **kwargs)

    gradients.calls = 0
    monkeypatch.setattr(module, "gradients", gradients)


def test_non_finite_stop_keeps_the_state_before_it(tiny_base, tmp_path, monkeypatch):
    poison(monkeypatch, at=3)
    with pytest.raises(UserError, match=r"step 2: .*not finite.*non_finite=skip"):
        fit(resolve(tiny_recipe(tiny_base, tmp_path)))
    saved = checkpoint.checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")
    assert [p.name for p in saved] == ["step-2"]
    recipe = tiny_recipe(tiny_base, tmp_path)
    monkeypatch.undo()
    assert fit(resolve(recipe), "yes") == 0


def test_non_finite_skip_leaves_the_weights_alone(tiny_base, tmp_path, monkeypatch):
    poison(monkeypatch, at=3)
    fit(resolve(tiny_recipe(tiny_base, tmp_path, trainer={"steps": 4, "batch_tokens": 256, "non_finite": "skip"})))
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "runs" / "tiny").values())
    assert "update skipped" in (tmp_path / "runs" / "tiny" / "log.txt").read_text()


def test_non_finite_rewind_leaves_the_data_out(tiny_base, tmp_path, monkeypatch):
    poison(monkeypatch, at=4)
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 6, "batch_tokens": 256, "non_finite": "rewind"})
    fit(resolve(recipe | {"checkpoint": {"every": 2}}))
    run = tmp_path / "runs" / "tiny"
    assert "rewound to step-2, leaving out 2 steps" in (run / "log.txt").read_text()
    assert max(losses(run)) == 6


def test_disk_full_while_saving_keeps_the_last_checkpoint(tiny_base, tmp_path, monkeypatch):
    original = checkpoint.dcp.save

    def full(*args, **kwargs):
        full.calls += 1
        if full.calls == 2:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    full.calls = 0
    recipe = tiny_recipe(tiny_base, tmp_path) | {"checkpoint": {"every": 2}}
    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match=r"(?s)step 4.*No space left.*--resume"),
    ):
        patched.setattr(checkpoint.dcp, "save", full)
        fit(resolve(recipe))
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-2"]
    assert fit(resolve(recipe), "yes") == 0


def test_resume_refuses_changed_data(tiny_base, tmp_path, monkeypatch):
    recipe = tiny_recipe(tiny_base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 2)
        fit(resolve(recipe))
    path = Path(recipe["data"]["train"][0]["source"]["path"])
    path.write_text(
        path.read_text() + '\n{"text": "one more document that was not there before, long enough to count"}'
    )
    with pytest.raises(UserError, match="training data changed"):
        fit(resolve(recipe), "yes")


def test_zero_steps_convert_and_export(tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 0, "batch_tokens": 256})
    recipe["evaluation"] = {}
    assert fit(resolve(recipe)) == 0
    assert (tmp_path / "runs" / "tiny" / "export" / "model.safetensors").is_file()


def test_lora_trains_few_parameters_and_exports_merged(tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, trainable={"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}})
    assert fit(resolve(recipe)) == 0
    names = weights(tmp_path / "runs" / "tiny").keys()
    assert not any("lora" in n or "base_layer" in n for n in names)


@pytest.mark.parametrize("policy", [True, "selective", "offload"])
def test_activation_checkpointing_changes_no_loss(policy, tiny_base, tmp_path):
    """Configurations that must give the same trajectory, through the real run."""
    plain = tiny_recipe(tiny_base, tmp_path, run={"name": "plain"})
    again = tiny_recipe(tiny_base, tmp_path, run={"name": "again"})
    again["trainer"] |= {"activation_checkpointing": policy, "microbatch": 4}
    for recipe in (plain, again):
        recipe["evaluation"] = {}
        fit(resolve(recipe))
    a, b = (losses(tmp_path / "runs" / n) for n in ("plain", "again"))
    assert max(abs(a[s] - b[s]) for s in a) < 1e-5 * max(a.values())
    assert abs(sum(a[s] - b[s] for s in a)) < 1e-5 * max(a.values()), "no drift either"


def test_checkpoint_index_admits_no_foreign_classes(tmp_path):
    import pickle

    folder = tmp_path / "step-1"
    folder.mkdir()

    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="no place in a checkpoint"):
        checkpoint.Reader(str(folder)).read_metadata()
