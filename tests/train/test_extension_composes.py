"""One recipe from an extended tokenizer over next-token training of the new rows and MEAP to block diffusion."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt.components import SamplerChoice
from adapt.config import decode, resolve
from adapt.train.fit import fit
from adapt.train.validate import check
from tests import tiny
from tests.train.test_fit import losses
from tests.train.test_frozen_rows import EMBEDDING, ROWS, moved, saved, start_of
from tests.train.test_vocabulary_run import extending

MASK = {"name": "mask_token", "token": "<|mask|>"}
BLOCKS = {"name": "block_diffusion", "block_size": 4}


def three_stages(base, folder, tied: bool, init):
    """2 steps of the new rows, 2 of MEAP, 3 of block diffusion; the mask token is one more new row."""
    stages = [
        {"name": "rows", "trainable": {"include": ROWS[tied], "rows": "new"}, "trainer": {"steps": 2}},
        {"name": "meap", "objective": {"name": "meap", "ratio": 0.15}, "trainer": {"steps": 2}},
        {
            "name": "blocks",
            "objective": {**BLOCKS, "growth": {"name": "geometric", "start": 2, "every": 2}},
            "trainer": {"steps": 3},
            "evaluation": {"suites": ["bpb", {"name": "masked_ce", "block_size": 4}], "limit": 2},
        },
    ]
    over = {
        "model": {"conversions": [{"name": "vocabulary", "pad_to_multiple": 8, "init": init}, MASK]},
        "checkpoint": {"keep": 9},
        "evaluation": {"suites": ["bpb"], "limit": 2},
        "generation": {"prompts": ["a comunicação"], "max_new_tokens": 6, "samplers": ["ar", BLOCKS]},
    }
    recipe = extending(base, folder, **over) | {"stages": stages}
    recipe["data"]["eval"] = [{**recipe["data"]["train"][0], "name": "held-out"}]
    recipe["data"]["decontaminate"] = None  # the text is the training text: it is there to be measured on
    return recipe


@pytest.mark.parametrize(
    ("family", "tied", "init"), [("llama", True, None), ("qwen2", False, {"name": "focus", "dim": 8})]
)
def test_extend_then_meap_then_block_diffusion(family, tied, init, tmp_path):
    base = tiny.save_tiny(tmp_path / "base", family, tie_word_embeddings=tied)
    recipe = three_stages(base, tmp_path, tied, init)
    assert check(resolve(recipe)).problems == []
    before = start_of(recipe)
    assert fit(resolve(recipe)) == 0
    run = tmp_path / "runs" / "tiny"
    assert sorted(losses(run)) == list(range(1, 8))
    assert all(math.isfinite(loss) for loss in losses(run).values())

    rows = saved(run, 2, recipe)  # the first stage trained new rows only, that of the mask token among them
    for name in before:
        changed = moved(before[name], rows[name])
        assert not changed or ("embed_tokens" in name or "lm_head" in name), name
        assert all(320 <= i <= 360 for i in changed)
    assert len(moved(before[EMBEDDING], rows[EMBEDDING])) >= 10
    assert moved(rows[EMBEDDING], saved(run, 4, recipe)[EMBEDDING])[0] < 320  # the second trained everything

    model, tokenizer = (kind.from_pretrained(run / "export") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.mask_token_id == tokenizer.mask_token_id == 360
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 361
    shared = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert shared == tied
    ids = tokenizer("a comunicação e a informação")["input_ids"]
    assert max(ids) >= 320  # text is made of new tokens
    assert tokenizer.decode(ids) == "a comunicação e a informação"
    for sampler in ("ar", BLOCKS):
        found = decode(sampler, SamplerChoice).build().generate(model, ids, max_new_tokens=9)
        assert 0 < len(found.tokens) <= 9
        assert 360 not in found.tokens
        assert max(found.tokens) < 361
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([ids])).logits).all()
