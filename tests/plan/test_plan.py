from __future__ import annotations

import json
import subprocess
import sys
from math import prod

import pytest

from adapt.cli import main
from adapt.config import load, shipped_recipes
from adapt.config.decode import encode
from adapt.config.text import write_yaml
from adapt.errors import UserError
from adapt.plan.advice import warnings
from adapt.plan.cluster import GIB, Grid
from adapt.plan.read import stage_plans
from tests.plan.stages import cluster_of, planned, recipe_of
from tests.plan.test_traffic import LLAMA_8B

CHECKPOINTED = {"activation_checkpointing": True}
LONG = {"seq_len": 4096}
PAPER_STEP = {"steps": 100, "batch_tokens": 4096 * 512}


def large(gpus: int = 64, memory: float = 80.0, trainer: dict | None = None, **over):
    return planned(recipe_of(arch=LLAMA_8B, data=LONG, trainer=PAPER_STEP | (trainer or {}), **over), gpus, memory)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_can_be_planned(name):
    plans, _ = stage_plans(load(name, []), cluster_of(64))
    for plan in plans:
        assert plan.tokens_per_second > 0
        assert plan.worst(plan.rows).total > 0
        assert json.dumps(warnings(plan))


def test_the_largest_microbatch_fits_and_one_more_row_does_not():
    plan = large()
    assert 0 < plan.largest < large(memory=400).largest
    assert plan.worst(plan.largest).total <= plan.room
    assert plan.largest == plan.rows_a_rank or plan.worst(plan.largest + 1).total > plan.room


def test_checkpointing_takes_memory_off_and_time_on():
    whole, again = large(), large(trainer=CHECKPOINTED)
    assert again.worst(1).total < whole.worst(1).total
    assert again.compute_seconds > whole.compute_seconds


def test_sharded_weights_gradients_and_moments_are_16_bytes_a_parameter_over_all_ranks():
    plan = large()
    kinds = plan.moments(1)[-1].kinds
    held = sum(kinds[kind] for kind in ("weights", "gradients", "optimizer"))
    assert held * 64 == pytest.approx(16 * plan.student.parameters(), rel=1e-4)


def test_replicas_hold_more_and_send_less_between_nodes():
    one, copies = large(), large(trainer={"mesh": {"replicate": 8}})
    assert copies.grid == Grid(8, 8)
    assert copies.moments(1)[-1].kinds["weights"] == pytest.approx(8 * one.moments(1)[-1].kinds["weights"], rel=1e-3)
    assert {s.kind for s in copies.sent} - {s.kind for s in one.sent} == {"all_reduce"}


def test_a_dense_model_takes_six_operations_a_parameter_and_token_besides_attention():
    recipe = recipe_of(arch=LLAMA_8B, data={"seq_len": 64}, trainer={"precision": "fp32"})
    plan = planned(recipe, 64)
    multiplied = sum(prod(w.shape) for w in plan.student.weights if w.linear)
    attention = 3 * 32 * 4 * (64**2 / 2) * 4096
    assert plan.arithmetic.student == 6 * multiplied * 64 + attention
    assert plan.arithmetic.recomputed == 0


def test_block_diffusion_reads_the_row_twice():
    diffusion = {"conversions": ["mask_token"], "objective": {"name": "block_diffusion", "block_size": 32}}
    twice, once = large(**diffusion), large()
    assert twice.work.read == 2 * once.work.read
    assert 1.9 < twice.arithmetic.total / once.arithmetic.total < 2.1


def test_adapters_have_no_moments_of_the_base():
    plan = large(trainable={"lora": {"rank": 16}})
    kinds = plan.moments(1)[-1].kinds
    assert kinds["optimizer"] == pytest.approx(2 * kinds["gradients"], rel=0.01)
    assert kinds["gradients"] < kinds["weights"] / 50


@pytest.mark.parametrize("precision, bytes_each", [("bf16", 2), ("fp32", 4)])
def test_buffers_are_in_the_compute_dtype(precision, bytes_each):
    plan = large(trainer={"precision": precision})
    (gathered,) = [s for s in plan.sent if s.kind == "all_gather"]
    assert gathered.bytes < 2 * bytes_each * plan.student.parameters() <= 1.1 * gathered.bytes


def test_what_does_not_fit_comes_with_remedies_that_do():
    plan = large(gpus=8, memory=24)
    assert not plan.fits
    text = "\n".join(warnings(plan))
    assert "does not fit" in text
    assert "activation_checkpointing=true" in text or "GPUs" in text
    assert large(gpus=64, memory=80, trainer=CHECKPOINTED).fits


def test_a_batch_that_ranks_cannot_share_is_named():
    plan = planned(recipe_of(trainer={"batch_tokens": 64 * 100}), 64)
    assert any("batch_tokens=6,400" in line and "8,192" in line for line in warnings(plan))


def test_a_mesh_that_does_not_make_the_ranks_is_refused():
    with pytest.raises(UserError, match=r"trainer\.mesh"):
        _ = planned(recipe_of(trainer={"mesh": {"shard": 3, "replicate": 5}}), 64).grid


def test_the_network_counts_where_it_is_slow():
    fast, slow = large(), planned(recipe_of(arch=LLAMA_8B, data=LONG, trainer=PAPER_STEP), 64, network=0.001)
    assert slow.traffic_seconds > slow.compute_seconds
    assert slow.step_seconds > fast.step_seconds
    assert any("network is the limit" in line for line in warnings(slow))


def test_a_ring_within_a_node_and_one_over_nodes():
    cluster = cluster_of(64, network=1.0)
    assert cluster.rate(Grid(8, 8), "shard") == 450e9
    assert cluster.rate(Grid(64), "shard") == 8 * 50e9
    assert cluster.rate(Grid(8, 8), "replicate") == 50e9


def test_matrix_optimizers_send_and_adamw_does_not():
    assert large().optimizer.sent == 0
    for name in ("muon", "cosmos", "soap"):
        assert large(optimizer={"name": name, "lr": 1e-4}).optimizer.sent > 0


def test_the_verb_prints_and_its_json_is_the_same_plan(capsys):
    arguments = ["plan", "-c", "paper/nbdiff-qwen3-8b", "--gpus", "64", "--gpu-memory", "80"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (stage,) = found["stages"]
    assert stage["model"]["parameters"]["total"] == 8_190_735_360
    assert "8,190,735,360 parameters" in text
    assert stage["memory"]["fits"]
    worst = stage["memory"]["moments"][stage["memory"]["worst"]]["total"]
    assert f"{worst / GIB:.1f} of 76.0 GiB" in text
    assert found["assumed"]["efficiency"] == 0.4
    assert "40% of 989 TFLOP/s" in text


def test_a_stage_that_does_not_fit_is_exit_code_1(capsys):
    assert main(["plan", "-c", "paper/dap-llama-3.3-70b-instruct", "--gpus", "8", "--gpu-memory", "40"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_numbers_that_make_no_cluster_are_all_named(capsys):
    asked = ["--gpus", "0", "--gpu-memory", "80", "--gpu", "h10", "--efficiency", "4"]
    assert main(["plan", "-c", "paper/nbdiff-qwen3-8b", *asked]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in ("--gpus", "--gpu:", "'h100'", "--efficiency"))


def test_verify_prints_both_columns(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(write_yaml(encode(recipe_of())))
    assert main(["plan", "-c", str(path), "--gpus", "16", "--gpu-memory", "80", "--json", "--verify"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    for what, (formula, seen) in stage["verified"].items():
        assert formula == seen or what.startswith("memory"), what


def test_formulas_build_no_module():
    """What takes seconds at 70B is building; a plan reads shapes off the config."""
    code = (
        "import sys\n"
        "from adapt.cli import main\n"
        "main(['plan', '-c', 'paper/dap-llama-3.3-70b-instruct', '--gpus', '512', '--gpu-memory', '80'])\n"
        "built = [m for m in sys.modules if m.startswith('transformers.models.llama.modeling') or m.startswith('lightning')]\n"
        "assert not built, built\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TIGHT = {
    "eight small GPUs": (["-c", "paper/nbdiff-qwen3-8b"], 8, 24),
    "one GPU": (["-c", "paper/nbdiff-qwen3-8b"], 1, 80),
    "a fixed microbatch": (["-c", "paper/nbdiff-qwen3-8b", "trainer.microbatch=16"], 64, 80),
    "no checkpointing": (["-c", "paper/nbdiff-qwen3-8b", "trainer.activation_checkpointing=false"], 8, 24),
    "two copies": (["-c", "paper/dap-llama-3.1-8b", "trainer.mesh={shard: 8, replicate: 2}"], 16, 20),
}


@pytest.mark.parametrize("case", TIGHT)
def test_advice_that_is_followed_makes_it_fit(case, capsys):
    """Every line of it, typed as it is printed."""
    recipe, gpus, memory = TIGHT[case]
    asked = ["plan", *recipe, "--gpu-memory", str(memory)]
    assert main([*asked, "--gpus", str(gpus), "--json"]) == 1
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    advice = [line for line in stage["warnings"] if line.startswith("  ") and " GiB with " in line]
    assert advice
    for line in advice:
        typed = [word.rstrip(":") for word in line.replace("--gpus ", "--gpus=").split()]
        typed = [word for word in typed if word.startswith(("--gpus", "trainer."))]
        assert typed, line
        more = typed if any(word.startswith("--gpus") for word in typed) else [f"--gpus={gpus}", *typed]
        assert main([*asked, *more, "--json"]) == 0, line
        found = json.loads(capsys.readouterr().out)["stages"][0]["memory"]
        promised = float(line.split(" GiB with ")[0].split()[-1])
        worst = found["moments"][found["worst"]]["total"] / GIB
        assert worst == pytest.approx(promised, abs=0.06), line


def test_a_base_out_of_reach_is_asked_for_in_words_to_type(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = ["plan", "-c", "nbdiff", "--gpus", "8", "--gpu-memory", "80", "model.arch=null"]
    assert main([*asked, "model.base=meta-llama/Llama-3.1-8B-Instruct"]) == 2
    told = capsys.readouterr().err
    assert "'model.arch={model_type: llama, hidden_size: 4096," in told
    shape = told.split("'model.arch=")[1].split("'")[0]
    assert main([*asked[:-1], f"model.arch={shape}", "model.base=meta-llama/Llama-3.1-8B-Instruct"]) == 0
    assert "8,030,261,248 parameters" in capsys.readouterr().out
    assert main([*asked, "model.base=nobody/nothing"]) == 2
    assert "num_hidden_layers: N" in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["0", "-3", "nan", "inf"])
def test_a_gpu_without_memory_is_refused_by_that_name(memory, capsys):
    assert main(["plan", "-c", "dap", "--gpus", "8", "--gpu-memory", memory]) == 2
    assert "--gpu-memory" in capsys.readouterr().err


def test_the_optimizer_takes_the_time_of_reading_what_it_keeps():
    plan = large()
    moved = (2 * 4 + 2 * 8 + 3 * 4) * plan.student.parameters() / 64  # weights, moments; gradients
    assert plan.optimizer_seconds == pytest.approx(moved / plan.cluster.kind.memory, rel=1e-3)
    assert plan.tokens_per_second * plan.step_seconds == pytest.approx(plan.tokens_a_step)
    assert large(trainer={"mesh": {"offload": True}}).optimizer_seconds == 0
