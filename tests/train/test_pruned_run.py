"""A run on a pruned vocabulary, from recipe to export."""

from __future__ import annotations

import json

import torch

from adapt.cli import main
from adapt.config import resolve
from adapt.train.fit import fit
from adapt.train.validate import check
from tests.conversion.pruned import EOS, save_base, save_pruned, small
from tests.recipes import WORDS, tiny_recipe
from tests.tokenization.byte_level import SPECIALS


def pruning(folder, **over):
    """Next-token training of a tiny model that lost the tokens which its texts never use."""
    base = folder / "base"
    if not base.exists():
        save_base(base)
        save_pruned(folder / "pruned", " ".join(WORDS))
    sections = {
        "model": {"conversions": ["pruned_vocabulary"]},
        "tokenizer": {"path": str(folder / "pruned")},
        "objective": "next_token",
        "evaluation": {"suites": ["bpb"], "limit": 4},
        "generation": {"prompts": ["the model"], "max_new_tokens": 8, "samplers": ["ar"]},
    }
    return tiny_recipe(base, folder, **{**sections, **over})


def test_a_pruned_model_trains_and_generates_in_plain_transformers(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = len(small(" ".join(WORDS)).ids)
    recipe = pruning(tmp_path, model={"conversions": [{"name": "pruned_vocabulary", "pad_to_multiple": 16}]})
    assert check(resolve(recipe), offline=True).problems == []
    assert fit(resolve(recipe)) == 0
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert all(map(torch.isfinite, torch.tensor(losses)))
    export = tmp_path / "runs/tiny/export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert len(tokenizer) == size
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == -(-size // 16) * 16
    assert model.get_input_embeddings().weight.data_ptr() == model.lm_head.weight.data_ptr()
    end = small(" ".join(WORDS)).ids[SPECIALS[0]]
    assert end != EOS
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == end
    ids = tokenizer("the model", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(made[0]).startswith("the model")
    capsys.readouterr()
    assert main(["generate", str(export), "--prompt", "the model", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_what_is_no_pruned_tokenizer_is_said_by_validate(tmp_path):
    recipe = pruning(tmp_path)
    found = check(resolve(pruning(tmp_path, tokenizer={"path": str(tmp_path / "base")})), offline=True).problems
    assert [p.where for p in found] == ["tokenizer.path"]
    assert "nothing to drop" in found[0].what
    assert [p.where for p in check(resolve(pruning(tmp_path, tokenizer={"path": None}))).problems] == ["tokenizer.path"]
    taught = pruning(tmp_path, teacher={"base": "self"}, evaluation={"suites": ["kl_to_base"]})
    assert "teacher.base" in [p.where for p in check(resolve(taught)).problems]
    recipe["model"]["conversions"] = [
        {"name": "mask_token", "token": "<|mask|>"},
        {"name": "pruned_vocabulary", "pad_to_multiple": 0},
    ]
    found = [p.what for p in check(resolve(recipe)).problems if p.where == "model.conversions[1]"]
    assert [what.partition(" ")[0] for what in found] == ["the", "pad_to_multiple=0"]
    assert "comes first" in found[0]
