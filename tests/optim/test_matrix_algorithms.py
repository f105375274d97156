"""What every matrix algorithm owes: odd gradients and shapes, fused and stacked weights, an exact resume, honest state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adapt.optim import newton_schulz
from tests.optim.suites import SHAPES, close, gradients, steps, suite, weights

NAMES = ["muon", "soap", "cosmos"]


def copies(parameters):
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_then_normal_ones(name):
    ours = weights()
    optimizer = suite(name, ours, weight_decay=0.0)
    before = copies(ours)
    steps(optimizer, 0, 3, scale=0.0)
    assert all(map(torch.equal, before, ours))
    steps(optimizer, 3, 9)
    assert all(p.isfinite().all() for p in ours)
    assert not any(map(torch.equal, before, ours))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_gradient_counts_as_zeros(name):
    ours, theirs = weights(), weights()
    one, other = suite(name, ours), suite(name, theirs)
    for step in range(4):
        for parameters, missing in ((ours, None), (theirs, 0.0)):
            for i, (p, g) in enumerate(zip(parameters, gradients(parameters, step), strict=True)):
                p.grad = (None if missing is None else missing * g) if (i + step) % 3 == 0 else g
        one.step()
        other.step()
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_left_as_they_are(name):
    ours = weights()
    steps(suite(name, ours), 0, 3)
    assert all(map(torch.equal, (p.grad for p in ours), gradients(ours, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_of_tensor_type_is_the_rate(name):
    ours, theirs = weights(), weights()
    one, other = suite(name, ours, lr=0.01, weight_decay=0.1), suite(name, theirs, lr=0.01, weight_decay=0.1)
    one.param_groups[0]["lr"] = torch.tensor(one.param_groups[0]["lr"])
    before = copies(ours)
    steps(one, 0, 3)
    steps(other, 0, 3)
    assert close(ours, theirs, before) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_fused_stacked_and_transposed_weights_are_their_matrices(name):
    """Parts of a fused weight, experts and [in, out] storage step as so many separate weights."""
    parts = [(20, 16), (24, 16), (20, 16)]
    separate = weights(parts)
    one = suite(name, separate, precondition_frequency=2) if name == "soap" else suite(name, separate)
    fields = {"precondition_frequency": 2} if name == "soap" else {}
    fused = nn.Parameter(torch.cat([p.detach() for p in separate]))
    flipped = [nn.Parameter(p.detach().T.contiguous()) for p in separate]
    stacked = nn.Parameter(torch.stack([separate[0].detach(), separate[2].detach()]))
    others = {
        "fused": suite(name, [fused], split=(20, 24, 20), **fields),
        "flipped": suite(name, flipped, transposed=True, **fields),
        "stacked": suite(name, [stacked], **fields),
    }
    before = copies(separate)
    for step in range(6):
        given = gradients(separate, step)
        fused.grad, stacked.grad = torch.cat(given), torch.stack([given[0], given[2]])
        for p, q, g in zip(separate, flipped, given, strict=True):
            p.grad, q.grad = g, g.T.contiguous()
        one.step()
        for other in others.values():
            other.step()
    assert close(fused.detach().split([20, 24, 20]), separate, before) < 1e-4
    assert close([p.T for p in flipped], separate, before) < 1e-4
    assert close(stacked.detach().unbind(), separate[::2], before[::2]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact(name):
    straight, broken = weights(), weights()
    whole, first = suite(name, straight), suite(name, broken)
    steps(whole, 0, 25)
    steps(first, 0, 12)
    saved = copy.deepcopy(first.state_dict())
    second = suite(name, broken)
    second.load_state_dict(saved)
    steps(second, 12, 25)
    assert all(map(torch.equal, straight, broken))


@pytest.mark.parametrize("name", NAMES)
def test_state_is_contiguous_and_holds_nothing_else_alive(name):
    ours = weights()
    optimizer = suite(name, ours)
    keys = {key: [s.keys() for s in optimizer.state.values()] for key in ("before", "after")}
    steps(optimizer, 0, 12)
    assert keys["before"] == [s.keys() for s in optimizer.state.values()]
    for state in optimizer.state.values():
        for value in state.values():
            assert value.is_contiguous()
            assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_batched_steps_equal_looped_ones(name, monkeypatch):
    """What an accelerator runs, here on the CPU: matrices of one shape stacked, and stepped by one call."""
    shapes = [*SHAPES[:3], *SHAPES[:3]]
    ours, theirs = weights(shapes), weights(shapes)
    before = copies(ours)
    one, other = suite(name, ours), suite(name, theirs)
    for first, last in ((0, 1), (1, 12)):
        for optimizer, looped in ((other, {"cpu"}), (one, set())):
            monkeypatch.setattr(newton_schulz, "LOOPED", looped)
            steps(optimizer, first, last)
        for parameter, twin in zip(ours, theirs, strict=True):
            for key in one.state[parameter].keys() & {"basis_left", "basis_right"}:
                if first == 0:  # eigenvectors of a null space are anybody's
                    one.state[parameter][key].copy_(other.state[twin][key])
    assert close(ours, theirs, before) < 1e-3
