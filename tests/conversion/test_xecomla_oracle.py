"""Parity with the authors' repository (AMD-AGI/AMD-Hybrid-Models at 61c9348, folder X-EcoMLA), recorded once.

`xecomla_layer.json` was written by running their `DeepseekV3Attention` with its `re_init_q` and `re_init_kv`, on the
teacher's weights and the inputs made here, in float64 (their SVD and softmax are cast to float32, which was taken out; what
of their imports transformers 5 lacks was stubbed). It holds numbers only; their code is not in this repository. Singular
vectors are defined up to their sign, so factors are compared by their squares and by their products, and gradients times
their parameters.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapt.components import ConversionChoice
from adapt.config import decode
from adapt.conversion.factors import spectrum
from adapt.conversion.latent_shape import round_up
from tests import tiny
from tests.pretrained.recipes import recipe

SWITCHES = {"rope": "last", "shared_key": "mean", "svd": "weight", "sigma": "down", "latent_norm": "none"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
COMMON = {"hidden": 48, "heads": 4, "head_dim": 16, "theta": 10000.0, "scaling": None}
CASES = {
    "gqa": {**COMMON, "kv_heads": 2, "q_rank": 32, "kv_rank": 24, "nope": 8, "rope": 8},
    "mha": {**COMMON, "kv_heads": 4, "q_rank": 40, "kv_rank": 16, "nope": 12, "rope": 4},
    "overlap": {**COMMON, "kv_heads": 2, "q_rank": 32, "kv_rank": 24, "nope": 16, "rope": 16},
    "yarn": {**COMMON, "kv_heads": 1, "q_rank": 32, "kv_rank": 16, "nope": 8, "rope": 8, "theta": 500000.0, "scaling": 32.0},
}  # fmt: skip
PLACES = [0, 1, 2, 3, 40, 41, 700, 701, 702, 3000, 3001, 9000]
DIRECTIONS = 8
ENERGIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


def drawn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def projections(case: dict) -> dict[str, Tensor]:
    """Of the teacher's layer, [out, in]."""
    queries, keys = case["heads"] * case["head_dim"], case["kv_heads"] * case["head_dim"]
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    found = {name: 0.2 * drawn(n, case["hidden"], seed=i) for i, (name, n) in enumerate(rows.items())}
    return found | {"o_proj": 0.2 * drawn(case["hidden"], queries, seed=3)}


def states(case: dict) -> tuple[Tensor, Tensor]:
    """Inputs [1, S, d] of the layer, and what its output is multiplied with for the gradients."""
    return tuple(drawn(1, len(PLACES), case["hidden"], seed=seed) for seed in (4, 5))


def numbers(w: Tensor) -> list[float]:
    """Products with matrices of norm about one."""
    maker = torch.Generator().manual_seed(11)
    return [
        float(
            (w.detach().double() * torch.randn(w.shape, generator=maker, dtype=torch.float64)).sum() / w.numel() ** 0.5
        )
        for _ in range(DIRECTIONS)
    ]


def measured(weights: dict[str, Tensor], gradients: dict[str, Tensor], inputs: Tensor, output: Tensor, rank: int):
    """What is recorded of a layer; weights by their names here, gradients of them and of the inputs."""
    q_a, q_b, kv_a, kv_b = (weights[n] for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
    found = {
        "q_a squared": q_a**2,
        "q_b squared": q_b**2,
        "kv_a squared": kv_a[:rank] ** 2,
        "kv_b squared": kv_b**2,
        "queries": q_b @ q_a,
        "keys and values": kv_b @ kv_a[:rank],
        "rope key": kv_a[rank:],
        "o": weights["o_proj"],
        "output": output,
        "gradient of the inputs": inputs,
        **{f"{name} times its gradient": weights[name] * grad for name, grad in gradients.items()},
    }
    return {name: numbers(w) for name, w in found.items()}


def ours(case: dict) -> dict[str, list[float]]:
    """The layer as a recipe makes it, from a teacher of one layer."""
    rope = {"rope_theta": case["theta"], "rope_type": "default"}
    if case["scaling"]:
        rope |= LLAMA3 | {"factor": case["scaling"]}
    teacher = tiny.tiny_model(
        hidden_size=case["hidden"], num_attention_heads=case["heads"], num_key_value_heads=case["kv_heads"],
        head_dim=case["head_dim"], num_hidden_layers=1, max_position_embeddings=131072, rope_parameters=rope,
        dtype=torch.float64,
    )  # fmt: skip
    attention = teacher.model.layers[0].self_attn
    with torch.no_grad():
        for name, weight in projections(case).items():
            getattr(attention, name).weight.copy_(weight)
    wish = {"name": "xecomla", **SWITCHES, "kv_rank": case["kv_rank"], "q_rank": case["q_rank"]}
    wish |= {"rope_dim": case["rope"], "nope_dim": case["nope"], "rope_scaling": "yarn" if case["scaling"] else "base"}
    choice = decode(wish, ConversionChoice, "conversion")
    layer = choice.build(recipe("base")).apply(teacher, None).model.layers[0].self_attn
    if (scale := (case["nope"] + case["rope"]) / case["head_dim"]) != 1:
        with torch.no_grad():  # we make up for the softmax's other scale where dimensions overlap; they do not
            layer.q_b_proj.weight.div_(scale**0.5)
    x, target = states(case)
    out = layer(x.requires_grad_(), torch.tensor([PLACES]))[0]
    (out * target).sum().backward()
    weights = {n.removesuffix(".weight"): w.detach() for n, w in layer.named_parameters()}
    gradients = {n.removesuffix(".weight"): w.grad for n, w in layer.named_parameters()}
    return measured(weights, gradients, x.grad, out, case["kv_rank"])


def recorded() -> dict:
    return json.loads((Path(__file__).parent / "xecomla_layer.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_authors_layer(name):
    """Its start, its outputs and its gradients, in float64 (angles are float32 on both sides)."""
    theirs = recorded()["layers"][name]
    assert theirs["case"] == CASES[name]
    found = ours(CASES[name])
    assert found.keys() == theirs["numbers"].keys()
    for what, values in found.items():
        torch.testing.assert_close(
            values, theirs["numbers"][what], atol=1e-10, rtol=0, msg=lambda m, w=what: f"{w}: {m}"
        )


def test_ranks_of_an_energy_are_the_authors_or_one_step_more():
    """Their code keeps the last rank below the share, the paper's equation 14 and ours the first that reaches it; both
    are rounded up to a multiple of 8."""
    for name, case in CASES.items():
        weights = projections(case)
        kv = spectrum(torch.cat([weights["k_proj"], weights["v_proj"]]))
        full = min(case["hidden"], 2 * case["kv_heads"] * case["head_dim"])
        for share, theirs in zip(ENERGIES, recorded()["ranks"][name], strict=True):
            exact = kv.rank_of_energy(share)
            crossed = share < 1 and (exact - 1) % 8 == 0 and exact > 1
            assert round_up(exact, full) == min(theirs, full) + 8 * crossed  # their repeated heads have zeros besides
