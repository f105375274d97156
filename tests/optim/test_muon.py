"""Muon: torch.optim.Muon with float32 Newton-Schulz, and the layouts a parameter may have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapt.optim.newton_schulz import QUINTIC
from tests.optim.suites import SHAPES, close, gradients, steps, suite, weights


def float32_newton_schulz(x, coefficients, count, eps):
    a, b, c = coefficients
    x, tall = x / x.norm().clamp(min=eps), x.size(0) > x.size(1)
    x = x.T if tall else x
    for _ in range(count):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_thirty_steps_equal_torch_muon_in_float32(scale, nesterov, monkeypatch):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", float32_newton_schulz)
    ours, theirs = weights(), weights()
    mine = suite("muon", ours, lr=0.02, weight_decay=0.1, scale=scale, nesterov=nesterov)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=scale)
    for step in range(30):
        before = [p.detach().clone() for p in theirs]
        for optimizer in (mine, other):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)  # what a schedule sets acts in the step that follows
        for parameter, gradient in zip(theirs, gradients(theirs, step), strict=True):
            parameter.grad = gradient
        other.step()
        steps(mine, step, step + 1)
        assert close(ours, theirs, before) < 1e-3


def test_bfloat16_weights_keep_a_float32_momentum():
    ours = [nn.Parameter(p.detach().bfloat16()) for p in weights()]
    optimizer = suite("muon", ours, lr=0.1)
    reference = weights()
    before = [p.detach().clone() for p in reference]
    steps(optimizer, 0, 2)
    steps(suite("muon", reference, lr=0.1), 0, 2)
    assert all(optimizer.state[p]["momentum"].dtype == torch.float32 for p in ours)
    assert close(ours, reference, before) < 0.1


def test_state_is_one_number_per_weight():
    ours = weights()
    optimizer = suite("muon", ours)
    assert optimizer.state_bytes() == sum(4 * p.numel() for p in ours)
    assert optimizer.param_groups[0]["ns_coefficients"] == QUINTIC


def test_update_sizes():
    """0.2 sqrt(max(m, n)) makes the root mean square of an update about 0.2 of the rate where Newton-Schulz has found
    singular values of one; the original scale has spectral norm sqrt(max(1, m/n))."""
    for shape in SHAPES[:3]:
        for scale, lower, upper in [("match_rms_adamw", 0.13, 0.25), ("original", 0.0, 0.3)]:
            ours = [nn.Parameter(torch.zeros(shape))]
            steps(suite("muon", ours, lr=1.0, scale=scale), 0, 1)
            rms = float(ours[0].detach().square().mean().sqrt())
            assert lower < rms < upper
            if scale == "original":
                norm = float(torch.linalg.matrix_norm(ours[0].detach(), 2))
                assert 0.9 < norm / max(1, shape[0] / shape[1]) ** 0.5 < 1.3
