"""The shipped extension of the real base, and its model (needs the base's package and the corpora; slow)."""

from __future__ import annotations

import os

import pytest
import torch

from adapt.config import load
from adapt.conversion.base import apply_conversions
from adapt.pretrained import load_model, load_tokenizer
from adapt.tokenization.extend import extend
from adapt.tokenization.recipe import load as load_tokenizer_recipe

CACHE = os.environ.get("ADAPT_CACHE", "~/.cache/adapt")
"""The user's own: the base and the corpora are large."""
ENGLISH = "The quick brown fox jumps over the lazy dog; 1234 times."
PORTUGUESE = "A instalação do sistema não é difícil, mas exige atenção à configuração da rede."


@pytest.mark.slow
def test_the_shipped_extension_of_the_real_base(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAPT_CACHE", CACHE)
    made = extend(load_tokenizer_recipe("cabrita-pt", [f"dir={tmp_path}", "tokens=1000", "sweep=[]"]))
    assert made.num_tokens == 1000
    assert not any(made.proofs.values())
    of = {(name, text): fit for name, text, fit in made.fits}
    assert of["cabrita-pt", "portuguese"].fertility < 0.8 * of["base", "portuguese"].fertility
    assert made.changes["english"].changed_rate < 0.05
    recipe = load("cabrita", ["tokenizer.recipe=null", f"tokenizer.path={made.out}"]).recipe
    model, tokenizer = load_model(recipe), load_tokenizer(recipe)
    old = model.get_input_embeddings().num_embeddings
    ids = tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    assert int(ids.max()) < old  # English as before
    with torch.no_grad():
        before = model(ids).logits
        apply_conversions(recipe, model, tokenizer)
        after = model(ids).logits
    assert after.shape[-1] == 50176  # 49,152 + 1,000, up to a multiple of 64
    assert torch.allclose(after[..., :old], before, atol=1e-5)
    new = tokenizer(PORTUGUESE)["input_ids"]
    assert max(new) >= old
    assert torch.isfinite(model(torch.tensor([new])).logits).all()
