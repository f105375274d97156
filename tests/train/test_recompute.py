"""Policies of activation checkpointing: the same gradients, less kept, and for `selective` less computed again."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adapt.train.recompute import checkpoint_layers
from tests import tiny

IDS = torch.arange(64)[None] % 300


def trained(policy, family: str = "llama") -> tuple[dict[str, torch.Tensor], int, int]:
    """(gradients, floating point operations, bytes kept for the backward) of one step."""
    model = tiny.tiny_model(family, num_hidden_layers=3).train()
    checkpoint_layers(model, policy)
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, counter.get_total_flops(), kept


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("policy", [True, "selective", "offload"])
def test_gradients_are_those_without(policy, family):
    expected, found = trained(False, family)[0], trained(policy, family)[0]
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_selective_computes_less_again_than_full_and_full_keeps_least():
    (_, plain, all_of_it), (_, selective, _), (_, full, least) = (trained(p) for p in (False, "selective", True))
    assert plain < selective < full
    assert least < all_of_it / 2
