"""Models and recipes that block diffusion cannot serve are told so, before anything is decoded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers.cache_utils as caches

from adapt.components import samplers
from adapt.errors import UserError
from tests import tiny

ENTRY = samplers["block_diffusion"]


@pytest.mark.parametrize("layer", ("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer"))
def test_layers_with_a_running_state(layer, monkeypatch):
    """Both kinds: linear attention alone, and beside full attention in one layer."""
    model = tiny.tiny_model()  # transformers imports lazily: its modules must not keep what is patched here
    state = getattr(caches, layer)()
    monkeypatch.setattr(caches, "DynamicCache", lambda config: SimpleNamespace(layers=[caches.DynamicLayer(), state]))
    built = ENTRY.factory(ENTRY.config_type(block_size=4, mask_token_id=3))
    with pytest.raises(UserError, match="linear attention"):
        built.generate(model, [5, 6], max_new_tokens=4)


def recipe(objective, arch=None):
    choice = SimpleNamespace(name="some", config=objective)
    return SimpleNamespace(objective=choice, model=SimpleNamespace(arch=arch))


def test_block_size_has_to_come_from_somewhere():
    (problem,) = ENTRY.config_type().problems(recipe(SimpleNamespace()))
    assert "block_size: 8" in problem.what
    assert not list(ENTRY.config_type().problems(recipe(SimpleNamespace(block_size=8))))
    assert not list(ENTRY.config_type().problems(recipe(SimpleNamespace(), {"block_size": 8})))
    assert not list(ENTRY.config_type(block_size=4).problems(recipe(SimpleNamespace())))


@pytest.mark.parametrize("name", ("ar", "block_diffusion", "self_speculation"))
def test_every_bad_prompt_of_a_batch_is_named(name):
    entry = samplers[name]
    fields = {} if name == "ar" else {"block_size": 4, "mask_token_id": 3}
    built = entry.factory(entry.config_type(**fields))
    with pytest.raises(UserError) as caught:
        built.generate_batch(tiny.tiny_model(), [[5], [], [5] * 512, [999]], max_new_tokens=4)
    told = [str(p) for p in caught.value.problems]
    assert [t.split(":")[0] for t in told] == ["prompt 1", "prompt 2", "prompt 3"]
    assert all(word in t for word, t in zip(("empty", "shorten", "999"), told, strict=True))


def test_self_speculation_needs_an_ar_pass_and_a_block_size():
    config = samplers["self_speculation"].config_type
    assert not list(config().problems(recipe(SimpleNamespace(block_size=8, context="causal"))))
    for objective, word in (
        (SimpleNamespace(block_size=8, context="block"), "context=causal"),
        (SimpleNamespace(block_size=None, context="causal"), "context=causal"),
        (SimpleNamespace(), "block_size: 8"),
    ):
        (problem,) = config().problems(recipe(objective))
        assert word in problem.what
