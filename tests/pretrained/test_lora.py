from __future__ import annotations

import copy

import pytest
import torch

from adapt.config.schema import Lora
from adapt.errors import UserError
from adapt.pretrained.lora import adapted_names, add_lora, merge_lora
from tests import tiny

IDS = torch.arange(3, 43)[None]


def trained(family="llama"):
    model = add_lora(tiny.tiny_model(family), Lora(rank=4, alpha=8.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fresh_adapters_change_nothing_and_only_they_train(family):
    base = tiny.tiny_model(family)
    model = add_lora(tiny.tiny_model(family), Lora(rank=4))
    assert type(model) is type(base)
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    hidden = model.model(input_ids=IDS).last_hidden_state
    assert torch.equal(hidden, base.model(input_ids=IDS).last_hidden_state)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in n for n in names)
    assert len(names) == 2 * 7 * 2  # A and B, seven targets, two layers


def test_merging_keeps_the_logits_and_leaves_a_plain_model():
    model = trained()
    before = model(IDS).logits
    merged = merge_lora(copy.deepcopy(model))
    assert (merged(IDS).logits - before).abs().max() < 1e-4  # another order of summation
    assert (before - tiny.tiny_model()(IDS).logits).abs().max() > 1e-2  # the adapters did something
    assert merged.state_dict().keys() == tiny.tiny_model().state_dict().keys()


def test_targets_that_match_nothing_are_an_error():
    with pytest.raises(UserError, match=r"'q_prok' matches no linear module. Did you mean 'q_proj'"):
        add_lora(tiny.tiny_model(), Lora(targets=("q_prok", "v_proj")))
    with pytest.raises(UserError, match="tied"):
        add_lora(tiny.tiny_model(), Lora(targets=("lm_head",)))
    with pytest.raises(UserError, match="empty"):
        add_lora(tiny.tiny_model(), Lora(targets=()))


def test_names_are_known_without_putting_adapters_in():
    lora = Lora(rank=2, targets=("q_proj", "mlp.up_proj"))
    expected = adapted_names(tiny.tiny_model(), lora)
    assert set(expected) == {name for name, _ in add_lora(tiny.tiny_model(), lora).named_parameters()}
