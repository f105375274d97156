"""Block diffusion with what else a recipe may ask for: a few steps each, to an export that decodes."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt.components import SamplerChoice
from adapt.config import decode, resolve
from adapt.train.fit import fit
from tests import tiny
from tests.recipes import WORDS, tiny_recipe


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    turn = [{"role": "user", "content": " ".join(WORDS[:6])}, {"role": "assistant", "content": " ".join(WORDS[6:16])}]
    path.write_text("\n".join(json.dumps({"messages": turn + [{**m, "content": m["content"] + str(i)} for m in turn]})
                              for i in range(40)))  # fmt: skip
    return {"train": [{"source": {"name": "jsonl", "path": str(path)}, "name": "chats"}]}


CASES = {
    "chat": {},
    "chat, lora": {"trainable": {"lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}}},
    "chat, random phase": {"objective": {"name": "block_diffusion", "block_size": 4, "growth": None, "phase": "random"}},
    "vocabulary grows by the mask token": {"model": {"conversions": [{"name": "mask_token", "token": "<|new|>"}]}},
    "next-token training first": {
        "stages": [{"name": "ar", "objective": "next_token", "evaluation": {"suites": ["bpb"]}}, {"name": "blocks"}]
    },
    "in place, block-causal": {
        "objective": {
            "name": "block_diffusion", "block_size": 4, "growth": None, "context": "block", "ar_weight": 0.0,
            "prediction": "inplace", "block_first": "noisy", "weighting": "elbo",
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_block_diffusion_composes(case, family, chats, tmp_path):
    base = tiny.save_tiny(tmp_path / "base", family)
    over = dict(CASES[case])
    stages = over.pop("stages", None)
    recipe = tiny_recipe(base, tmp_path, trainer={"steps": 3, "batch_tokens": 256, "microbatch": 2}, **over)
    recipe["data"] |= chats
    if stages:
        recipe["stages"] = stages
    assert fit(resolve(recipe)) == 0
    folder = tmp_path / "runs" / "tiny" / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.mask_token_id == model.config.mask_token_id
    found = decode("block_diffusion", SamplerChoice).build().generate(model, [9, 8, 7], max_new_tokens=9)
    assert len(found.tokens) == 9
    assert model.config.mask_token_id not in found.tokens


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_give_the_same_losses(tiny_base, tmp_path):
    from tests.train.test_fit import losses

    for name in ("plain", "compiled"):
        recipe = tiny_recipe(tiny_base, tmp_path, run={"name": name})
        recipe["trainer"] |= {"compile": name == "compiled", "steps": 3}
        fit(resolve(recipe))
    a, b = (losses(tmp_path / "runs" / n) for n in ("plain", "compiled"))
    assert max(abs(a[s] - b[s]) for s in a) < 1e-5 * max(a.values())
