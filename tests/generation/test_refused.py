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
    state = getattr(caches, layer)()
    monkeypatch.setattr(caches, "DynamicCache", lambda config: SimpleNamespace(layers=[caches.DynamicLayer(), state]))
    built = ENTRY.factory(ENTRY.config_type(block_size=4, mask_token_id=3))
    with pytest.raises(UserError, match="linear attention"):
        built.generate(tiny.tiny_model(), [5, 6], max_new_tokens=4)


def recipe(objective, arch=None):
    choice = SimpleNamespace(name="some", config=objective)
    return SimpleNamespace(objective=choice, model=SimpleNamespace(arch=arch))


def test_block_size_has_to_come_from_somewhere():
    (problem,) = ENTRY.config_type().problems(recipe(SimpleNamespace()))
    assert "block_size: 8" in problem.what
    assert not list(ENTRY.config_type().problems(recipe(SimpleNamespace(block_size=8))))
    assert not list(ENTRY.config_type().problems(recipe(SimpleNamespace(), {"block_size": 8})))
    assert not list(ENTRY.config_type(block_size=4).problems(recipe(SimpleNamespace())))
