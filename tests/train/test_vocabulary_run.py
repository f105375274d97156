"""A run that extends the vocabulary, from recipe to export."""

from __future__ import annotations

import json

import torch

from adapt.config import resolve
from adapt.train.fit import fit
from adapt.train.validate import check
from tests import tiny
from tests.conversion.extended import TEXT, save_extended
from tests.recipes import tiny_recipe


def extending(base, folder, **over):
    """Next-token training of a tiny model with 40 new tokens, on text that uses them."""
    tokenizer = folder / "extended"
    if not tokenizer.exists():
        save_extended(tokenizer)
    corpus = folder / "pt.jsonl"
    words = TEXT.split()
    corpus.write_text("\n".join(json.dumps({"text": " ".join(words[i % 7 :])}) for i in range(40)))
    sections = {
        "model": {"conversions": ["vocabulary"]},
        "tokenizer": {"path": str(tokenizer)},
        "data": {
            "train": [{"source": {"name": "jsonl", "path": str(corpus)}}],
            "eval": [],
            "exact_dedup": False,
            "seq_len": 64,
        },
        "objective": "next_token",
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "evaluation": {"suites": []},
        "generation": {"prompts": [], "samplers": []},
    }
    return tiny_recipe(base, folder, **{**sections, **over})


def test_an_extended_model_trains_and_loads_in_plain_transformers(tiny_base, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mask = {"name": "mask_token", "token": "<|mask|>"}
    conversions = [{"name": "vocabulary", "pad_to_multiple": 64}, mask]
    recipe = extending(tiny_base, tmp_path, model={"conversions": conversions})
    assert check(resolve(recipe)).problems == []
    assert fit(resolve(recipe)) == 0
    export = tmp_path / "runs/tiny/export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 384
    assert model.get_input_embeddings().weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert (len(tokenizer), tokenizer.mask_token_id, model.config.mask_token_id) == (361, 360, 360)
    ids = tokenizer("comunicação e informação", return_tensors="pt").input_ids
    assert len(ids[0]) < len(tiny.tiny_tokenizer()("comunicação e informação").input_ids)
    assert torch.isfinite(model(ids).logits).all()
    assert tokenizer.decode(ids[0]) == "comunicação e informação"


def test_what_keeps_a_tokenizer_from_being_an_extension_is_said_by_validate(tiny_base, tmp_path):
    recipe = extending(tiny_base, tmp_path, tokenizer={"path": str(tiny_base)})
    found = check(resolve(recipe), offline=True).problems
    assert [p.where for p in found] == ["tokenizer.path"]
    assert "nothing to extend" in found[0].what
    recipe = extending(tiny_base, tmp_path, tokenizer={"path": None})
    assert [p.where for p in check(resolve(recipe)).problems] == ["tokenizer.path"]
    conversion = {"name": "vocabulary", "pad_to_multiple": 0, "init": {"name": "blend", "share": 2.0}}
    recipe = extending(tiny_base, tmp_path, model={"conversions": [conversion]})
    taught = extending(tiny_base, tmp_path, teacher={"base": "self"}, evaluation={"suites": ["kl_to_base"]})
    assert "teacher.base" in [p.where for p in check(resolve(taught)).problems]
    where = "model.conversions[0]"
    assert [p.where for p in check(resolve(recipe)).problems] == [where, f"{where}.init"]
