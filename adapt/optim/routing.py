"""Which parameter is trained how: by what its module is and by its name, never by its size alone.

Every trained parameter is in exactly one group. A size rule (a matrix of at most 10,000 rows, say) would give the MLP of a
large model the embedding's rate and a small vocabulary the matrices' algorithm, without a word.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from adapt.errors import Problem, UserError
from adapt.optim.groups import ROLES, GroupedConfig, given

LEAST = 16
"""A matrix with fewer rows or columns has too few singular directions to speak of; a router of experts may be larger."""
ROUTERS = ("router", "gate", "shared_expert_gate")


@dataclass(frozen=True)
class Route:
    name: str
    parameter: nn.Parameter
    role: str
    transposed: bool = False
    """Stored as [in, out]."""
    pattern: int = -1
    """Number of the entry of `optimizer.groups` that claimed it; -1 for none."""


def roles(model: nn.Module) -> dict[str, str]:
    """Name -> role of every parameter, frozen ones included; a tied head goes by the embedding's name and role."""
    heads = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            found.setdefault(id(parameter), (name, _role(name, module, parameter, embeddings, module is heads)))
    return dict(found[id(p)] for _, p in model.named_parameters())


def _role(name: str, module: nn.Module, parameter: nn.Parameter, embeddings: set[int], head: bool) -> str:
    path = name.split(".")
    if id(parameter) in embeddings:
        return "embedding"
    if (head or (len(path) > 1 and path[-2] == "lm_head")) and parameter.ndim == 2:
        return "head"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if parameter.ndim == 3 and ("expert" in name.lower() or "expert" in type(module).__name__.lower()):
        return "matrix"
    linear = isinstance(module, nn.Linear) or is_transposed(module)
    if linear and parameter.ndim == 2 and min(parameter.shape) >= LEAST and (path[-2:-1] or [""])[0] not in ROUTERS:
        return "matrix"
    return "other"


def is_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D, which stores [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def route(config: GroupedConfig, model: nn.Module, special: bool) -> list[Route]:
    """Each trained parameter of `model` once. `special`: matrices have an algorithm of their own, and with it demands.

    Raises UserError with every problem: patterns and roles that match nothing, a parameter in two groups, vectors and
    embeddings among the matrices, parts that do not make up a fused weight.
    """
    of = roles(model)
    flipped = {id(m.weight) for m in model.modules() if is_transposed(m)}
    problems: list[Problem] = []
    for index, group in enumerate(config.groups):
        if not fnmatch.filter(of, group.match):
            what = (
                f"{group.match!r} matches no parameter; names look like {next(iter(of), 'nothing: there are none')!r}"
            )
            problems.append(Problem(f"optimizer.groups[{index}].match", what))
    problems += _roles_without_parameters(config, set(of.values()))
    routes = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        claims = [i for i, group in enumerate(config.groups) if fnmatch.fnmatch(name, group.match)]
        if len(claims) > 1:
            others = " and ".join(f"groups[{i}]" for i in claims)
            problems.append(Problem(f"optimizer.groups[{claims[1]}].match", f"{name} is claimed by {others}; keep one"))
        one = Route(name, parameter, of[name], id(parameter) in flipped, claims[0] if claims else -1)
        if claims:
            role = config.groups[claims[0]].role or one.role
            one = replace(one, transposed=one.transposed or config.groups[claims[0]].transposed)
            problems += _forced(config, one, role, special)
            one = replace(one, role=role)
        routes.append(one)
    if problems:
        raise UserError(problems)
    return routes


def _roles_without_parameters(config: GroupedConfig, present: set[str]) -> Iterator[Problem]:
    for role in given(config):
        wanted = any(group.role == role for group in config.groups)
        if role not in present and not wanted:
            why = "the head is tied to the embedding: use optimizer.embedding" if role == "head" else "leave it out"
            yield Problem(f"optimizer.{role}", f"no parameter of this model has this role; {why}")


def _forced(config: GroupedConfig, one: Route, role: str, special: bool) -> Iterator[Problem]:
    """What cannot be a matrix, and parts that are not the whole."""
    group, where, parameter = config.groups[one.pattern], f"optimizer.groups[{one.pattern}]", one.parameter
    if special and role == "matrix" and parameter.ndim not in (2, 3):
        what = f"{one.name} has {parameter.ndim} dimension(s), and a matrix has two (experts: three); use role: other"
        yield Problem(f"{where}.role", what)
    elif special and role == "matrix" and one.role in ("embedding", "head"):
        what = (
            f"{one.name} is the {one.role}: its rows are tokens, most of them without a gradient in a step, and a step "
            f"on its singular directions would move them all; use role: {one.role}"
        )
        yield Problem(f"{where}.role", what)
    if (group.split or group.transposed) and (role != "matrix" or parameter.ndim < 2):
        what = f"{one.name} is no matrix here (its role is {role}); split and transposed are for matrices"
        yield Problem(where, what)
    elif group.split and sum(group.split) != (rows := parameter.shape[-1 if one.transposed else -2]):
        what = f"{list(group.split)} are {sum(group.split):,} rows, and {one.name} has {rows:,}"
        yield Problem(f"{where}.split", what)


def param_groups(
    config: GroupedConfig, model: nn.Module, adamw: dict[str, Any], matrix: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Groups for the Suite, matrices first: parameters, role, rates, and the hyperparameters of their algorithm.

    `adamw` is everything but the matrices' (`algorithm` and its own numbers), `matrix` the matrices'; null: AdamW too.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for one in sorted(route(config, model, matrix is not None), key=lambda r: ROLES.index(r.role)):
        named = config.groups[one.pattern] if one.pattern >= 0 else None
        section = config.sections()[one.role]
        lr = next((g.lr for g in (named, section) if g is not None and g.lr is not None), config.rate(one.role))
        decay = next((g.weight_decay for g in (named, section) if g is not None and g.weight_decay is not None), None)
        if decay is None:
            spared = one.parameter.ndim < 2 or (one.role == "embedding" and not config.decay_embeddings)
            decay = 0.0 if spared else config.weight_decay
        layout = {}
        if one.role == "matrix" and matrix is not None:
            layout = {"split": named.split if named else (), "transposed": one.transposed}
        own = matrix if one.role == "matrix" and matrix is not None else adamw
        key = (one.role, one.pattern, lr, decay, *layout.values())
        if key not in found:
            rates = {"lr": lr, "base_lr_ratio": config.lr / lr if lr else 0.0, "weight_decay": decay}
            found[key] = {"params": [], "names": [], "role": one.role} | own | rates | layout
        found[key]["params"].append(one.parameter)
        found[key]["names"].append(one.name)
    return list(found.values())


def table(groups: list[dict[str, Any]]) -> str:
    """The routing table: every group with its algorithm, rates, and how much it holds."""
    rows = [("role", "algorithm", "lr", "decay", "tensors", "elements", "for example")]
    for group in groups:
        elements = sum(p.numel() for p in group["params"])
        first = group["names"][0]
        notes = _clamped(group)
        rows.append(
            (group["role"], group["algorithm"], f"{group['lr']:g}", f"{group['weight_decay']:g}",
             str(len(group["params"])), f"{elements:,}", f"{first}{notes}")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _clamped(group: dict[str, Any]) -> str:
    """A rank that is larger than some matrices have."""
    rank = group.get("rank", 0)
    sides = [min(p.shape[-2:]) for p in group["params"] if p.ndim > 1]
    if not isinstance(rank, int) or not sides or min(sides) >= rank:
        return ""
    return f"; rank {min(sides)} to {min(rank, max(sides))} of {rank}, which is what they have"
