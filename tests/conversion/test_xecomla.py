"""The conversion as a recipe uses it: students of both kinds, their exports, and what is refused (x-ecomla spec, 8-9)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt.config import load, resolve
from adapt.config.decode import encode
from adapt.conversion.base import apply_conversions, plan_conversions
from adapt.conversion.latent_shape import TeacherShape
from adapt.errors import StopRequested, UserError
from adapt.export.stock import is_latent, stock_form
from adapt.models.latent_attention import amplitude, frequencies
from adapt.pretrained import load_model, load_tokenizer
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, launch, losses, stop_after

PUBLISHED = {"rope": "last", "nope_dim": 4, "rope_dim": 4, "shared_key": "mean", "svd": "weight", "latent_norm": "none"}
IDS = torch.arange(4, 44)[None]


def made(base, folder, conversion=None, **over):
    over = {"objective": {"name": "next_token"}, "evaluation": {"suites": ["bpb"], "limit": 2}} | over
    over.setdefault("generation", {"prompts": ["the model"], "max_new_tokens": 6, "samplers": ["ar"]})
    conversions = [{"name": "xecomla", "kv_rank": 16} | (conversion or {})]
    return tiny_recipe(base, folder, model={"base": str(base), "conversions": conversions}, **over)


def student(base, folder, conversion=None, **over):
    recipe = resolve(made(base, folder, conversion, **over)).recipe
    model = apply_conversions(recipe, load_model(recipe), load_tokenizer(recipe))
    return model, load_model(recipe), recipe


def kl(model, teacher) -> float:
    """Nats per token, from the teacher."""
    theirs, ours = (m(IDS).logits.detach().log_softmax(-1) for m in (teacher, model))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.fixture
def bases(tmp_path_factory):
    def base(family="llama", **over):
        return tiny.save_tiny(tmp_path_factory.mktemp(family) / "base", family, **over)

    return base


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_student_is_the_stock_class(family, bases, tmp_path):
    """With every layer converted, in all families; and its config is known before its weights."""
    model, _, recipe = student(bases(family), tmp_path, {"biases": "drop"})
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    planned, _ = plan_conversions(recipe, load_model(recipe).config, None)
    assert planned.to_dict() | {"dtype": None} == model.config.to_dict() | {"dtype": None}
    assert not any("experts" in name for name, _ in model.named_parameters())
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(planned).named_parameters()}
    assert shapes == {n: p.shape for n, p in model.named_parameters()}


def test_more_rank_is_nearer_to_the_teacher(bases, tmp_path):
    base = bases(num_key_value_heads=4)
    found = [kl(*student(base, tmp_path, {"kv_rank": r, "rope_dim": 4})[:2]) for r in (8, 16, 32)]
    assert found[0] > found[1] > found[2]


def test_our_start_is_nearer_than_the_published_and_that_than_a_drawn_one(bases, tmp_path):
    """On one base; what it is worth on real models is measured in benchmarks/."""
    base = bases(num_key_value_heads=4, hidden_size=64, head_dim=16)
    ours, published, drawn = (
        kl(*student(base, tmp_path, c | {"kv_rank": 48})[:2])
        for c in ({"rope_dim": 8}, PUBLISHED | {"rope_dim": 8, "nope_dim": 8}, {"rope_dim": 8, "start": "random"})
    )
    assert ours < published < drawn


def test_layers_that_stay_are_the_teachers_bit_for_bit(bases, tmp_path):
    model, teacher, _ = student(bases(num_hidden_layers=3), tmp_path, {"layers": [0, 2]})
    assert model.config.token_mixers == ["latent", "attention", "latent"]
    theirs, ours = teacher.state_dict(), model.state_dict()
    kept = [n for n in theirs if ".self_attn." not in n or ".1.self_attn." in n or n.endswith("o_proj.weight")]
    assert len(kept) > 20
    assert all(torch.equal(theirs[n], ours[n]) for n in kept)


def test_a_calibrated_norm_starts_as_the_identity(bases, tmp_path):
    """Spec 8.2: gains of one on a latent of size one; the length of a latent changes by less than a percent in the
    mean of the training text."""
    from adapt.conversion.calibration import attention_inputs, training_rows

    model, teacher, recipe = student(bases(), tmp_path, {"latent_norm": "calibrated"})
    seen = attention_inputs(teacher, training_rows(recipe, 4096), range(2), 4096)
    for index, layer in enumerate(model.model.layers):
        mixer = layer.self_attn
        latent = (seen[index].sample @ mixer.kv_a_proj_with_mqa.weight.detach().T)[:, :16]
        normed = mixer.kv_a_layernorm(latent).detach()
        assert float(normed.norm(dim=1).mean() / latent.norm(dim=1).mean()) == pytest.approx(1, abs=0.01)
        assert bool((mixer.kv_a_layernorm.weight == 1).all())
    ones, _, _ = student(bases(), tmp_path, {"latent_norm": "ones"})
    assert kl(model, teacher) < kl(ones, teacher)


def test_ranks_of_an_energy_are_each_layers_own(bases, tmp_path):
    """Multiples of 8, in the config, and not changed by what another layer holds; the last one too."""
    base = bases(num_hidden_layers=3, num_key_value_heads=4)
    model, teacher, recipe = student(base, tmp_path, {"kv_rank": None, "kv_energy": 0.8, "svd": "weight"})
    ranks = model.config.mixer_options["latent"]["kv_rank"]
    assert all(r % 8 == 0 for r in ranks)
    with torch.no_grad():  # nothing but noise of rank 1 in the first layer
        attention = teacher.model.layers[0].self_attn
        for p in (attention.k_proj.weight, attention.v_proj.weight):
            p.copy_(torch.outer(torch.ones(len(p)), torch.ones(p.shape[1])))
    again = apply_conversions(recipe, teacher, load_tokenizer(recipe)).config.mixer_options["latent"]["kv_rank"]
    assert again == [8, *ranks[1:]]
    full, _, _ = student(base, tmp_path, {"kv_rank": None, "kv_energy": 1.0})
    assert full.config.mixer_options["latent"]["kv_rank"] == [32] * 3  # of d: the keys and values have 48 rows
    assert model.config.mixer_options["latent"]["kv_bias"]  # a channel is the ballast


STUDENTS = {
    "published": ("llama", PUBLISHED | {"q_rank": 24}),
    "with mamba2": ("qwen2", {"layers": [1]}),
    "shipped": ("llama", None),
}
CODE = {"published", "with mamba2"}
"""Students that no stock class holds."""


@pytest.mark.parametrize("name", STUDENTS)
def test_a_run_trains_exports_and_generates(name, bases, tmp_path):
    """Every kind of student, to an export that plain transformers loads: with no code of ours where the stock class can
    hold it. The cache is r_kv + d_r per token and layer there, too."""
    family, conversion = STUDENTS[name]
    base = bases(family, num_key_value_heads=4, num_hidden_layers=3)
    recipe = made(base, tmp_path, conversion, trainer={"steps": 2})
    if name == "with mamba2":  # one layer of each kind, biases and all
        recipe["model"]["conversions"].append({"name": "mamba2", "layers": [0]})
    if conversion is None:
        shipped = encode(load("xecomla").recipe)
        recipe["model"]["conversions"] = shipped["model"]["conversions"]
        recipe |= {"objective": shipped["objective"], "teacher": shipped["teacher"]}
    assert fit(resolve(recipe)) == 0
    run = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    config = json.loads((run / "export" / "config.json").read_text())
    assert (config["model_type"] == "adapted") == (name in CODE)
    assert ("auto_map" in config) == (name in CODE)
    shown = elsewhere(run / "export", name in CODE)
    assert shown["module"].startswith("transformers_modules" if name in CODE else "transformers.models.deepseek_v3")
    assert shown["tokens"] == 5
    assert shown["same"] < 1e-4


def elsewhere(folder, code: bool) -> dict:
    """Loaded where adapt is not: what its class is, that steps from the cache are the forward pass, and that it
    generates."""
    script = f"""
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code={code}).eval()
ids = torch.arange(4, 24)[None]
with torch.no_grad():
    whole = model(ids).logits
    out = model(ids[:, :12], use_cache=True)
    parts = [out.logits]
    for i in range(12, 20):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    same = float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=2).shape[1] - 20
assert "adapt" not in sys.modules
print(json.dumps({{"module": type(model).__module__, "same": same, "tokens": tokens}}))
"""
    env = os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder.parent, capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_padding_ranks_and_multiplying_out_queries_keep_the_logits(bases, tmp_path):
    """Spec 8.1 and 8.4."""
    model, _, _ = student(bases(num_key_value_heads=4), tmp_path, {"kv_rank": None, "kv_energy": 0.8, "q_rank": 24})
    ranks = model.config.mixer_options["latent"]["kv_rank"]
    with torch.no_grad():  # as after training: gains that are not one
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm.weight.uniform_(0.5, 1.5)
    assert is_latent(model.config)
    stock = stock_form(model, "hf")
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    assert stock.config.kv_lora_rank == max(ranks)
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, atol=2e-5, rtol=0)


def test_an_export_for_vllm_writes_the_head_out(bases, tmp_path):
    assert (
        fit(
            resolve(
                made(bases(), tmp_path, {"latent_norm": "calibrated"}, trainer={"steps": 1}, export={"target": "vllm"})
            )
        )
        == 0
    )
    from safetensors import safe_open

    folder = tmp_path / "runs" / "tiny" / "export"
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert torch.equal(weights.get_tensor("lm_head.weight"), weights.get_tensor("model.embed_tokens.weight"))


def test_an_export_is_a_base_again(bases, tmp_path):
    """Dense DeepseekV3 models can be adapted further (with preferences, say); converting them again is refused."""
    assert fit(resolve(made(bases(), tmp_path, trainer={"steps": 1}))) == 0
    export = tmp_path / "runs" / "tiny" / "export"
    recipe = made(export, tmp_path, run={"name": "second"}, trainer={"steps": 1})
    (problem,) = problems(resolve(recipe))
    assert problem.where == "model.base"
    assert "deepseek_v3" in problem.what
    recipe["model"]["conversions"] = []
    assert fit(resolve(recipe)) == 0


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
REFUSED = {
    "two sizes": ({"kv_cache": 0.5}, {}, {}, "model.conversions[0]", "give one of them"),
    "multiple of 8": ({"kv_rank": 12}, {}, {}, "model.conversions[0]", "try 16"),
    "full rank": ({"kv_rank": 64}, {}, {}, "model.conversions[0].kv_rank", "use at most 24"),
    "full rank of queries": (
        {"q_rank": 64},
        {},
        {},
        "model.conversions[0].q_rank",
        "full rank of this base's queries, 32",
    ),
    "no room": ({"kv_rank": None, "kv_cache": 0.1}, {}, {}, "model.conversions[0].kv_cache", "0.375 is the least"),
    "odd rope": ({"rope_dim": 3}, {}, {}, "model.conversions[0].rope_dim", "must be even"),
    "stride": ({"rope_dim": 6, "rope": "stride"}, {}, {}, "model.conversions[0].rope_dim", "does not divide"),
    "nope": ({"nope_dim": 8}, {}, {}, "model.conversions[0].nope_dim", "leave it out"),
    "layer": ({"layers": [7]}, {}, {}, "model.conversions[0].layers", "from 0 to 1"),
    "window": ({}, {"family": "mistral", "sliding_window": 128}, {}, "model.base", "look back 128"),
    "yarn": ({}, {}, {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "model.rope_scaling", "yarn"),
    "no factor for yarn": ({"rope_scaling": "yarn"}, {}, {}, "model.conversions[0].rope_scaling", "without one"),
    "context without yarn": ({"yarn_context": 8192}, {}, {}, "model.conversions[0]", "is for rope_scaling: yarn"),
    "llama3 for vllm": ({}, {}, {"rope_scaling": LLAMA3, "target": "vllm"}, "export.target", "for YaRN"),
    "hybrid for vllm": ({"layers": [0]}, {}, {"target": "vllm"}, "export.target", "convert all layers"),
    "no norm for vllm": ({"latent_norm": "none"}, {}, {"target": "vllm"}, "export.target", "use calibrated"),
    "ballast for vllm": ({}, {}, {"target": "vllm"}, "export.target", "latent_norm: calibrated"),
    "biases for vllm": ({}, {"family": "qwen2"}, {"target": "vllm"}, "export.target", "biases: drop"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_key_to_change(case, bases, tmp_path):
    conversion, base, over, where, says = REFUSED[case]
    recipe = made(bases(**base), tmp_path, conversion, export={"target": over.get("target", "hf")})
    if "rope_scaling" in over:
        recipe["model"]["rope_scaling"] = over["rope_scaling"]
    found = [p for p in problems(resolve(recipe)) if p.where == where]
    assert found, problems(resolve(recipe))
    assert any(says in p.what for p in found), found


def test_all_problems_of_a_wish_are_named_at_once(bases, tmp_path):
    recipe = made(bases(sliding_window=None), tmp_path, {"layers": [9], "rope_dim": 3, "q_rank": 64})
    places = {p.where.rpartition(".")[2] for p in problems(resolve(recipe))}
    assert {"layers", "rope_dim", "q_rank"} <= places


def test_another_vocabulary_than_the_teachers_is_refused(bases, tmp_path):
    """Distillation compares distributions over the same tokens."""
    from adapt.train.teacher import check_tokens

    other = tiny.tiny_tokenizer(300)
    with pytest.raises(UserError, match="other tokens"):
        check_tokens(tiny.tiny_tokenizer(), other)


def test_llama3_scaling_stays_with_its_frequencies(bases, tmp_path):
    """Spec 8.6: both the stock class and ours turn the chosen pairs as the base does."""
    rope = {"rope_theta": 10000.0} | LLAMA3
    base = bases(rope_parameters=rope, head_dim=16, max_position_embeddings=128)
    teacher = load_model(resolve(made(base, tmp_path)).recipe).model.rotary_emb.inv_freq
    for how, chosen in (("high", slice(0, 4)), ("stride", slice(0, 8, 2))):
        model, _, _ = student(base, tmp_path, {"rope": how})
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, teacher[chosen], atol=0, rtol=1e-5)
        torch.testing.assert_close(frequencies(model.config.rope_parameters, 8), teacher[chosen], atol=0, rtol=1e-5)


@pytest.mark.parametrize("conversion", [{}, PUBLISHED | {"nope_dim": 8, "rope_dim": 8}], ids=["ours", "published"])
def test_yarn_as_published_takes_the_bases_factor(conversion, bases, tmp_path):
    """Spec 1: in the place of any other scaling, and of a context of 4096, in the stock class (which vLLM knows it in,
    too) and in ours. Scores of positions are (0.1 ln(factor) + 1)^2 as large."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base = bases(rope_parameters={"rope_theta": 10000.0} | LLAMA3, head_dim=16, max_position_embeddings=128)
    model, _, _ = student(base, tmp_path, conversion | {"rope_scaling": "yarn"})
    stock = not conversion
    rope = model.config.rope_parameters if stock else model.config.mixer_options["latent"]["rope"]
    theta = 100.0 if stock else 10000.0
    wanted = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096, "rope_theta": theta}
    assert rope == wanted | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
    own, size = ROPE_INIT_FUNCTIONS["yarn"](tiny.tiny_config(head_dim=8, rope_parameters=wanted), "cpu")
    assert amplitude(rope) == size == pytest.approx(1 + 0.1 * math.log(2))
    torch.testing.assert_close(frequencies(rope, 8), own, atol=0, rtol=1e-6)
    if stock:
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, own, atol=0, rtol=1e-6)
        assert model.model.rotary_emb.attention_scaling == size
        served = made(base, tmp_path, {"rope_scaling": "yarn", "latent_norm": "calibrated"}, export={"target": "vllm"})
        assert not problems(resolve(served))


def test_a_run_goes_on_with_its_ranks(bases, tmp_path, monkeypatch):
    """Stopped and resumed, it is the run that went straight through, ranks of each layer's own included."""
    base, wish = bases(num_key_value_heads=4), {"kv_rank": None, "kv_energy": 0.8}
    straight, broken = (
        made(base, tmp_path, wish, run={"name": n}, trainer={"steps": 3}) for n in ("straight", "broken")
    )
    fit(resolve(straight))
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 1)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "broken")


def test_two_ranks_start_as_one_does(bases, tmp_path):
    """FSDP2: each rank converts, and shards what it made; the run is that of one process within float32 noise."""
    over = {"trainer": {"steps": 2, "microbatch": 1}}
    one = made(bases(), tmp_path, run={"name": "one"}, **over)
    two = made(bases(), tmp_path, run={"name": "two"}, **over)
    two["trainer"] |= {"devices": 2}
    fit(resolve(one))
    done = launch(two, tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = (losses(tmp_path / "runs" / name) for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert max(abs(a[s] - b[s]) for s in a) < 2e-5 * max(a.values())


def test_the_shape_of_a_teacher_is_read_from_any_family():
    assert TeacherShape.of(tiny.tiny_config("qwen3")) == TeacherShape(32, 4, 2, 8)
