"""Half-lives by layer, against the decays of each document alone."""

from __future__ import annotations

import math

import pytest
import torch

from adapt.evaluate.suites.half_lives import HalfLivesConfig
from tests.evaluate.test_ablation import beside, hybrid
from tests.evaluate.test_suites import SETS, documents, suite


@pytest.mark.parametrize("mixer", ["gated_linear", "mamba2"])
def test_every_token_head_and_channel_counts_once(mixer):
    model, grids, expected = hybrid(mixer), [], {0: [], 2: []}
    results = suite("half_lives", longest=64)(beside(model, keep=grids.append))
    for label in SETS:
        for tokens, scored in documents(label):
            if not any(scored):  # padding
                continue
            with torch.no_grad():
                hidden = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
                for i in expected:
                    layer = model.model.layers[i]
                    decays = layer.self_attn.recurrence.log_decays(layer.input_layernorm(hidden[i]))
                    expected[i] += (math.log(0.5) / decays).log2().flatten().tolist()
    (grid,) = grids
    assert grid.rows == ("00", "02")
    assert grid.columns == ("<1", "1", "2", "4", "8", "16", "32", "64")
    for cells, values in zip(grid.cells, expected.values(), strict=True):
        counts = [0] * 8
        for value in values:
            counts[min(max(math.floor(value) + 1, 0), 7)] += 1
        assert cells == pytest.approx([c / len(values) for c in counts])
        assert sum(cells) == pytest.approx(1)
    everything = [v for values in expected.values() for v in values]
    assert results == {"log2_half_life": pytest.approx(sum(everything) / len(everything))}
    assert not model.model.layers[0].self_attn.recurrence._forward_pre_hooks


@pytest.mark.parametrize("longest", [1, 48])
def test_bad_settings(longest):
    with pytest.raises(ValueError, match=f"longest={longest} must be a power of 2"):
        HalfLivesConfig(longest=longest)
