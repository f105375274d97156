"""AdamW: what it decays, and that a small step is a step."""

from __future__ import annotations

import pytest
import torch

from adapt.components import optimizers
from adapt.config import resolve
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.recipes import tiny_recipe


def made(model, **fields):
    entry = optimizers["adamw"]
    return entry.factory(entry.config_type(**fields), model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", [False, True])
def test_decay_spares_embeddings_norms_and_biases(tied, embeddings):
    """With a zero gradient only decay moves weights."""
    model = tiny.tiny_model("qwen2", tie_word_embeddings=tied)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = made(model, lr=0.1, weight_decay=0.1, decay_embeddings=embeddings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    layers = {n for n in before if n.endswith("proj.weight")}
    expected = (
        layers | ({"model.embed_tokens.weight"} if embeddings else set()) | (set() if tied else {"lm_head.weight"})
    )
    assert decayed == expected


def test_invariant_12_a_rate_of_1e_6_changes_fp32_weights():
    """100 steps at lr 1e-6 change more than 90 % of float32 master weights; of bfloat16 ones, hardly any."""
    changed = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.nn.init.normal_(torch.empty(64, 64), std=0.02).to(dtype))
        holder = torch.nn.Module()
        holder.weight, before = weight, weight.detach().clone()
        optimizer = made(holder, lr=1e-6)
        for _ in range(100):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        changed[dtype] = float((weight != before).float().mean())
    assert changed[torch.float32] > 0.9
    assert changed[torch.bfloat16] < 0.1


def test_invariant_12_bf16_weights_at_a_small_rate_are_refused(tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, optimizer={"name": "adamw", "lr": 1e-6})
    recipe["model"]["dtype"] = "bfloat16"
    (found,) = problems(resolve(recipe))
    assert found.where == "model.dtype"
    assert "2^-9" in found.what
    for allowed in ({"optimizer": {"name": "adamw", "lr": 1e-4}}, {"trainable": {"lora": {"rank": 2}}}):
        assert not problems(resolve(recipe | allowed))


def test_keep_goes_on_with_the_bias_corrections_step_counts(tiny_base, tmp_path, monkeypatch):
    """`optimizer_state: keep`: Adam's own step count is 5 after stages of 2 and 3; `reset` starts it again."""
    from adapt.train import fit as module

    for state, expected in (("keep", 5.0), ("reset", 3.0)):
        stages = [
            {"name": "a", "trainer": {"steps": 2}},
            {"name": "b", "trainer": {"steps": 3}, "optimizer_state": state},
        ]
        seen = []
        original = module._Run._stage

        def stage(self, *args, original=original, seen=seen, **kwargs):
            hooks = original(self, *args, **kwargs)
            seen.append({float(s["step"]) for s in hooks.optimizer.state.values()})
            return hooks

        with monkeypatch.context() as patched:
            patched.setattr(module._Run, "_stage", stage)
            recipe = tiny_recipe(tiny_base, tmp_path, run={"name": state}, objective="next_token")
            fit(resolve(recipe | {"evaluation": {}, "generation": {}, "stages": stages}))
        assert seen == [{2.0}, {expected}]
