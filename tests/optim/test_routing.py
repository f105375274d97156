"""Which parameter goes where: by module and name, every one exactly once, and all problems in one letter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapt.components import OptimizerChoice, optimizers
from adapt.config import decode, resolve
from adapt.errors import UserError
from adapt.optim.groups import GroupConfig, PatternConfig
from adapt.optim.routing import roles
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.recipes import tiny_recipe


def built(model, name="cosmos", **fields):
    entry = optimizers[name]
    return entry.factory(entry.config_type(**fields), model)


def algorithm_of(optimizer) -> dict[str, str]:
    return {name: group["algorithm"] for group in optimizer.param_groups for name in group["names"]}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "cosmos", "muon", "soap"])
def test_invariant_18_every_parameter_exactly_once(family, tied, name):
    model = tiny.tiny_model(family, tie_word_embeddings=tied)
    optimizer = built(model, name)
    listed = [n for group in optimizer.param_groups for n in group["names"]]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(n for n, _ in model.named_parameters())
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    expected = name
    for n, algorithm in algorithm_of(optimizer).items():
        assert algorithm == (expected if n.endswith("proj.weight") else "adamw"), n
    of = roles(model)
    assert of["model.embed_tokens.weight"] == "embedding"
    assert ("lm_head.weight" in of) != tied
    assert tied or of["lm_head.weight"] == "head"
    assert {of[n] for n in of if "norm" in n} == {"norm"}


def test_invariant_18_no_size_rule():
    """A wide MLP (14,336 rows) is matrices, a small vocabulary is not."""
    with torch.device("meta"):
        model = tiny.tiny_config("llama", hidden_size=64, intermediate_size=14336, vocab_size=80, num_hidden_layers=1)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(model)
    of = roles(model)
    assert {of[n] for n in of if ".mlp." in n} == {"matrix"}
    assert of["model.embed_tokens.weight"] == "embedding"


class Odd(nn.Module):
    """Everything a decoder may hold besides: experts, a router, Conv1D, narrow and one-dimensional weights."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_attn = Conv1D(96, 32)
        self.gate = nn.Linear(32, 64, bias=False)
        self.narrow = nn.Linear(32, 8, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(4, 48, 32))
        self.scale = nn.Parameter(torch.ones(32))
        self.positions = nn.Embedding(64, 32)
        self.final = nn.LayerNorm(32)


def test_experts_routers_and_narrow_weights():
    assert roles(Odd()) == {
        "scale": "other",
        "c_attn.weight": "matrix",
        "c_attn.bias": "other",
        "gate.weight": "other",
        "narrow.weight": "other",
        "experts.gate_up_proj": "matrix",
        "positions.weight": "embedding",
        "final.weight": "norm",
        "final.bias": "norm",
    }
    model = Odd()
    optimizer = built(model, groups=(PatternConfig(match="c_attn.weight", split=(32, 32, 32)),))
    (group,) = [g for g in optimizer.param_groups if "c_attn.weight" in g["names"]]
    assert group["transposed"]
    assert optimizer.state[model.c_attn.weight]["basis"].shape == (3, 32, 32)
    assert optimizer.state[model.experts.gate_up_proj]["proj_sq"].shape == (4, 48, 32)


def test_groups_have_their_own_rates():
    """Numbers are the rates themselves; what is left out comes from the optimizer, matrices' from lr x lr_ratio."""
    optimizer = built(
        tiny.tiny_model("llama"), lr=1e-3, weight_decay=0.1,
        norm=GroupConfig(lr=5e-4), embedding=GroupConfig(weight_decay=0.01),
        groups=(PatternConfig(match="*.q_proj.weight", lr=1e-5), PatternConfig(match="*.v_proj.weight", role="other")),
    )  # fmt: skip
    rates = {n: (g["lr"], g["weight_decay"], g["algorithm"]) for g in optimizer.param_groups for n in g["names"]}
    layer = "model.layers.0."
    assert rates[f"{layer}self_attn.q_proj.weight"] == (1e-5, 0.1, "cosmos")
    assert rates[f"{layer}self_attn.k_proj.weight"] == (1e-3 * 0.2, 0.1, "cosmos")
    assert rates[f"{layer}self_attn.v_proj.weight"] == (1e-3, 0.1, "adamw")
    assert rates[f"{layer}input_layernorm.weight"] == (5e-4, 0.0, "adamw")
    assert rates["model.embed_tokens.weight"] == (1e-3, 0.01, "adamw")


def test_all_problems_at_once():
    model = tiny.tiny_model("llama")
    with pytest.raises(UserError) as raised:
        built(
            model, head=GroupConfig(lr=1e-3),
            groups=(
                PatternConfig(match="*.nothing.*"),
                PatternConfig(match="model.embed_tokens.weight", role="matrix"),
                PatternConfig(match="*layernorm*", role="matrix"),
                PatternConfig(match="*.k_proj.weight", split=(8, 9)),
                PatternConfig(match="model.layers.0.*.k_proj.*", lr=1.0),
                PatternConfig(match="model.norm.weight", split=(16, 16)),
            ),
        )  # fmt: skip
    found = {problem.where: problem.what for problem in raised.value.problems}
    assert "matches no parameter; names look like 'model." in found["optimizer.groups[0].match"]
    assert "is the embedding" in found["optimizer.groups[1].role"]
    assert "has 1 dimension(s)" in found["optimizer.groups[2].role"]
    assert "[8, 9] are 17 rows, and model.layers.1" in found["optimizer.groups[3].split"]
    assert "claimed by groups[3] and groups[4]" in found["optimizer.groups[4].match"]
    assert "no matrix here" in found["optimizer.groups[5]"]
    assert "tied to the embedding" in found["optimizer.head"]


def test_frozen_parameters_are_in_no_group():
    model = tiny.tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    listed = [n for group in built(model).param_groups for n in group["names"]]
    assert listed
    assert all("layers.1" in n for n in listed)


def test_the_table_says_what_is_trained_by_what(tiny_base, tmp_path, capsys):
    recipe = tiny_recipe(
        tiny_base,
        tmp_path,
        optimizer={"name": "cosmos", "lr": 1e-3, "rank": 64},
        trainer={"steps": 1, "batch_tokens": 256},
    )
    fit(resolve(recipe | {"evaluation": {}}))
    shown = capsys.readouterr().out
    assert shown.count("role ") == 1
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith(("matrix ", "embedding ", "norm "))}
    assert rows["matrix"].split()[1:5] == ["cosmos", "0.0002", "0.1", "14"]
    assert "rank 16 to 32 of 64" in rows["matrix"]
    assert rows["embedding"].split()[1] == "adamw"


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"lr_ratio": 0.0}, "optimizer.lr_ratio"),
        ({"rank": -1}, "optimizer.rank"),
        ({"rank": 1.5}, "optimizer.rank"),
        ({"rank": 0, "gamma": 0}, "optimizer.gamma"),
        ({"beta3": 1.0}, "optimizer.beta3"),
        ({"ns_coefficients": [1.0, 2.0]}, "optimizer.ns_coefficients"),
        ({"matrix": {"lr": -1.0}}, "optimizer.matrix.lr"),
        ({"groups": [{"match": "*", "weight_decay": -1.0}]}, "optimizer.groups[0].weight_decay"),
        ({"groups": [{"match": "*", "split": [0, 4]}]}, "optimizer.groups[0].split"),
    ],
)
def test_ranges(fields, where, tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path, optimizer={"name": "cosmos", "lr": 1e-3} | fields)
    assert [p.where for p in problems(resolve(recipe))] == [where]


def test_switches_are_read_from_a_recipe():
    paper = {"beta1": 0.9, "beta2": 0.98, "nesterov": False, "eps_inside": True, "gamma": "lr_ratio", "lr_ratio": 0.25}
    config = decode({"name": "cosmos", "rank": 0.05} | paper, OptimizerChoice).config
    group = config.group()
    assert (group["gamma"], group["rank"], group["nesterov"]) == (0.25, 0.05, False)
