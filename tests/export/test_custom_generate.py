"""An export decodes by block diffusion where adapt is not installed, token for token as our own sampler does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt.components import SamplerChoice
from adapt.config import decode, load, resolve
from adapt.config.decode import encode
from adapt.generation.load import eos_ids
from adapt.train.fit import fit
from tests import tiny
from tests.recipes import tiny_recipe
from tests.test_presets import shrunk

ELSEWHERE = """
import json, sys
sys.modules["adapt"] = None  # an import of it would fail
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, prompts, settings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder)
longest = max(map(len, prompts))
ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
found = []
for options in settings:
    out = model.generate(ids, attention_mask=mask, custom_generate=folder, trust_remote_code=True, **options)
    found.append(out[:, longest:].tolist())
print(json.dumps(found))
"""
PROMPTS = [[9, 30, 200, 41, 7], [5, 60, 61, 62, 63, 64, 65, 66], list(range(100, 113))]
SETTINGS = [
    {"threshold": tau, "max_new_tokens": new, "block_size": b}
    for tau, new, b in ((0.05, 13, 4), (0.9, 11, 8), (1.0, 7, 1), (0.02, 20, 8))
]


@pytest.mark.parametrize("preset", ["presets/nbdiff", "presets/sdar", "presets/fast-dllm-v2", "presets/llada"])
def test_exports_decode_without_adapt_as_with_it(preset, tmp_path):
    """A preset of each kind of context and prediction, trained a little so that thresholds matter."""
    base = tiny.save_tiny(tmp_path / "base")
    recipe = tiny_recipe(base, tmp_path, trainer={"steps": 6, "batch_tokens": 512, "microbatch": 8})
    recipe |= {"objective": shrunk(encode(load(preset).recipe.objective)), "evaluation": {}, "generation": {}}
    recipe["optimizer"] = {"name": "adamw", "lr": 0.01}
    fit(resolve(recipe))
    folder = tmp_path / "runs" / "tiny" / "export"
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder), json.dumps(PROMPTS), json.dumps(SETTINGS)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder)
    ends = eos_ids(model, tiny.tiny_tokenizer())
    for options, found in zip(SETTINGS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        options = dict(options)
        new = options.pop("max_new_tokens")
        sampler = decode({"name": "block_diffusion", **options}, SamplerChoice).build()
        for result, answer in zip(
            sampler.generate_batch(model, PROMPTS, max_new_tokens=new, eos_ids=ends), found, strict=True
        ):
            assert answer[: len(result.tokens)] == result.tokens
            assert set(answer[len(result.tokens) :]) <= {0}, "rows that end early are filled up"


def test_what_block_diffusion_does_not_have_is_refused(tmp_path):
    from adapt.export.custom_generate.generate import generate

    model = tiny.tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="states no block_size"):
        model.config.mask_token_id = 3
        generate(model, ids)
    with pytest.raises(ValueError, match="num_beams"):
        generate(model, ids, num_beams=4)
    with pytest.raises(ValueError, match="threshold=2"):
        generate(model, ids, block_size=4, threshold=2)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, ids[:, :0])
    sampled = generate(model, ids, block_size=4, do_sample=True, max_new_tokens=9, eos_token_id=[])
    assert sampled.shape == (1, 12)
    assert 3 not in sampled[0, 3:].tolist()
