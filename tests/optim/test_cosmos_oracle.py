"""Parity with the authors' repository (lliu606/COSMOS at 61de180), recorded once.

`cosmos_head.json` was written by running their `COSMOS` class, unchanged but for Newton-Schulz in float64 instead of bfloat16,
on float64 copies of the weights and gradients made here; it holds numbers of the weights after 1, 10 and 30 steps. Their code
has no licence and is not in this repository. Its basis starts from an SVD of G'G, ours from one of G: the same space.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.optim.test_cosmos import gradients, over, run

COMMON = {"lr": 0.02, "lr_ratio": 0.2, "beta1": 0.95, "beta2": 0.95, "gamma": 0.2, "weight_decay": 0.1}
CASES = [
    {"shape": [48, 24], "rank": 8, **COMMON},
    {"shape": [24, 48], "rank": 8, **COMMON},
    {"shape": [32, 32], "rank": 4, **COMMON, "beta1": 0.9, "beta2": 0.999, "gamma": 0.5, "lr_ratio": 0.1},
]
DIRECTIONS = 16


def start(shape) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(3))


def numbers(w: torch.Tensor) -> list[float]:
    """Products with 16 matrices of norm about one."""
    maker, size = torch.Generator().manual_seed(11), w.numel()
    return [
        float((w.double() * torch.randn(w.shape, generator=maker, dtype=torch.float64)).sum() / size**0.5)
        for _ in range(DIRECTIONS)
    ]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_parity_with_the_authors_code(case):
    """Less than a thousandth of one step after 1, 10 and 30 steps: float32 against their float64."""
    recorded = json.loads((Path(__file__).parent / "cosmos_head.json").read_text())[case]
    fields = {k: v for k, v in CASES[case].items() if k not in ("shape", "lr", "weight_decay")}
    assert CASES[case] == {k: v for k, v in recorded.items() if k != "numbers"}
    eta = recorded["lr"] * recorded["lr_ratio"]
    optimizer = over(
        [torch.nn.Parameter(start(recorded["shape"]))],
        lr=eta, decay=recorded["weight_decay"], wd_lr="base", init="svd", **fields,
    )  # fmt: skip
    path = run(optimizer, [gradients(recorded["shape"], 30)])
    for step, expected in recorded["numbers"].items():
        difference = torch.tensor(numbers(path[int(step) - 1])) - torch.tensor(expected)
        assert difference.norm() / DIRECTIONS**0.5 < 1e-3 * eta
