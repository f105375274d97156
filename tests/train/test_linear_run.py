"""Runs that make a linear model: two stages to an export that needs no adapt, stopped and resumed, on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapt.config import resolve
from adapt.errors import UserError
from adapt.export.code import needed
from adapt.export.folder import export_folder
from adapt.export.weights import Whole
from adapt.generation.load import open_model
from adapt.models import modeling_adapted
from adapt.train.fit import fit
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import ROOT, assert_same_run, launch, losses, stop_after, weights

LORA = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}


def linear_recipe(base, folder, **over):
    """Attention transfer, then distillation with adapters; one layer of three keeps its attention."""
    over = {
        "model": {"base": str(base), "conversions": [{"name": "lawcat", "layers": [0]}, {"name": "mamba2", "layers": [2]}]},
        "objective": {"name": "attention_transfer"},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "trainable": {"include": ["*.recurrence.*"], "lora": LORA},
        "evaluation": {"suites": ["bpb"], "limit": 2},
        "generation": {"prompts": ["the model"], "samplers": ["ar"], "max_new_tokens": 6},
        "stages": [
            {"name": "transfer", "trainer": {"steps": 4}},
            {
                "name": "distillation",
                "objective": {"name": "logit_distillation", "ce": 0.1},
                "teacher": {"base": "self"},
                "trainable": {"include": ["*"], "lora": LORA},
                "trainer": {"steps": 3},
            },
        ],
    } | over  # fmt: skip
    stages = over.pop("stages")
    return tiny_recipe(base, folder, **over) | {"stages": stages}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_tiny(tmp_path_factory.mktemp("base"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADAPT_CACHE", str(folder / "cache"))
        assert fit(resolve(linear_recipe(base, folder))) == 0
    return folder / "runs" / "tiny"


def test_each_stage_trains_what_it_should_and_logs_it(base, run):
    """The loss of the first falls, its errors stand per layer; the second trains adapters and recurrences."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = [line for line in lines if "loss/transfer" in line]
    assert len(first) == 4
    assert {k for k in first[0] if "relative" in k} == {
        "loss/relative_error", "loss/relative_error/00", "loss/relative_error/02"
    }  # fmt: skip
    assert first[0]["loss/log2_half_life/00"] == pytest.approx(4, abs=0.1)  # exp(-ln2 / 16) a token
    assert first[0]["loss/log2_half_life/02"] == pytest.approx(9.97, abs=0.1)  # a thousand tokens
    report = (run / "report.html").read_text()
    assert "relative error of the token mixer" in report
    assert "half-life of the state" in report
    assert first[-1]["loss/relative_error"] < first[0]["loss/relative_error"]
    assert len([line for line in lines if "loss/kl" in line]) == 3
    before, after = load_file(base / "model.safetensors"), weights(run)
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qv"}


PROOF = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
ids = torch.arange(4, 40)[None]
with torch.no_grad():
    torch.save(model(ids, use_cache=False).logits, sys.argv[2])
same = [model.generate(ids, use_cache=c, max_new_tokens=9, do_sample=False).tolist() for c in (True, False)]
print(json.dumps([same[0] == same[1], "adapt" in sys.modules, type(model).__module__.partition(".")[0]]))
"""


def test_invariant_14_the_export_needs_no_adapt(run, tmp_path):
    """In a process that cannot import it: the same logits bit for bit, and cached decoding is uncached decoding."""
    hide = "import sys\nsys.modules['adapt'] = None\nsys.argv[0] = ''\n"
    done = subprocess.run(
        [sys.executable, "-c", hide + PROOF.replace('"adapt" in sys.modules', 'sys.modules["adapt"] is not None'),
         str(run / "export"), str(tmp_path / "logits.pt")],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, False, "transformers_modules"]
    model = open_model(str(run)).model
    assert type(model) is modeling_adapted.AdaptedForCausalLM
    with torch.no_grad():
        ours = model(torch.arange(4, 40)[None], use_cache=False).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), ours)


def test_invariant_14_the_folder_says_what_it_is(run):
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["token_mixers"] == ["gated_linear", "attention", "mamba2"]
    assert config["base_model_type"] == "llama"
    gate = config["mixer_options"]["gated_linear"]
    assert (gate["gate"], gate["chunk"], gate["exact"]) == ("channel", 64, False)
    with safe_open(run / "export" / "model.safetensors", "pt") as file:
        maps = [name for name in file.keys() if "q_map" in name or "k_map" in name]  # noqa: SIM118
    assert maps == ["model.layers.0.self_attn.recurrence.q_map.weight"], "a tied map is stored once"
    source = ROOT / "adapt" / "models"
    code = {path.stem for path in (run / "export").glob("*.py")}
    assert code == set(needed(source, "modeling_adapted"))


def test_invariant_15_merging_adapters_keeps_the_logits():
    import copy

    from adapt.config.schema import Lora
    from adapt.pretrained.lora import add_lora, merge_lora
    from tests.models.linear import ids, student

    model = add_lora(student(), Lora(rank=4, targets=("q_proj", "k_proj", "v_proj", "o_proj")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        model = model.double().eval()
        before = model(ids(2, 40)).logits
        merged = merge_lora(copy.deepcopy(model))(ids(2, 40)).logits
        torch.testing.assert_close(merged, before, atol=1e-11, rtol=1e-11)
        assert (before - student()(ids(2, 40)).logits).abs().max() > 1e-2


@pytest.mark.parametrize("change", ["lost", "extra"])
def test_invariant_14_weights_that_do_not_fit_are_refused(change, run, tmp_path):
    for file in (run / "export").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()) if file.is_file() else None
    tensors, name = weights(run), "model.layers.0.self_attn.recurrence.q_conv.weight"
    if change == "lost":
        del tensors[name]
    else:
        tensors |= {name.replace("layers.0", "layers.1"): tensors[name].clone()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    words = (
        r"lacks 1 of the model's weights: .*q_conv" if change == "lost" else "token_mixers gives no place: .*layers.1"
    )
    with pytest.raises(UserError, match=words):
        open_model(str(tmp_path))


def test_what_a_conversion_made_stays_float32(run, base, tmp_path, tokenizer):
    """In a bfloat16 export: decays and convolutions are few, and small steps of a decay are large in memory."""
    recipe = resolve(linear_recipe(base, tmp_path, export={"dtype": "bfloat16"})).recipe
    out = export_folder(
        Whole(open_model(str(run)).model), tokenizer, tmp_path / "out", recipe=recipe, resolved_yaml="", results={}, provenance={}
    )  # fmt: skip
    found = load_file(out / "model.safetensors")
    assert {w.dtype for n, w in found.items() if ".recurrence." in n} == {torch.float32}
    assert {w.dtype for n, w in found.items() if ".recurrence." not in n} == {torch.bfloat16}


def test_an_export_can_be_trained_further(run, tmp_path):
    """It is a base like others, without anyone's remote code."""
    over = {"model": {"base": str(run / "export"), "conversions": []}, "objective": {"name": "next_token"}}
    recipe = linear_recipe(run / "export", tmp_path, **over, trainable={}, stages=[{"name": "on"}])
    recipe["trainer"]["steps"] = 1
    assert fit(resolve(recipe)) == 0
    assert not torch.equal(weights(tmp_path / "runs" / "tiny")["model.norm.weight"], weights(run)["model.norm.weight"])


@pytest.mark.parametrize("step", [2, 5], ids=["transfer", "distillation"])
def test_a_run_stopped_inside_a_stage_goes_on_exactly(step, base, run, tmp_path, monkeypatch):
    from adapt.errors import StopRequested

    recipe = linear_recipe(base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, step)
        fit(resolve(recipe))
    assert fit(resolve(recipe), "yes") == 0
    assert_same_run(run, tmp_path / "runs" / "tiny")


def test_two_ranks_equal_one(base, run, tmp_path):
    """Both objectives, sharded: layers whose only gradient is their own error come back whole for it."""
    recipe = linear_recipe(base, tmp_path)
    recipe["trainer"] |= {"devices": 2, "microbatch": 1}
    done = launch(recipe, tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = losses(run), losses(tmp_path / "runs" / "tiny")
    assert a.keys() == b.keys()
    assert max(abs(a[s] - b[s]) / a[s] for s in a) < 1e-4
    x, y = weights(run), weights(tmp_path / "runs" / "tiny")
    assert max((x[k] - y[k]).abs().max() for k in x) < 2e-4
