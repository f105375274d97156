"""Converted layers learn what the teacher's layers do, each from the teacher's own hidden states.

    loss = mixer * mean over layers and tokens of d(what the token mixer adds, the same in the teacher)
         + block * mean over layers and tokens of d(hidden state behind the block, the same in the teacher)

with d the mean squared error (HALO) or the Euclidean distance (RADLADS, arXiv 2505.03005: mixers; MOHAWK stage 2, arXiv
2408.10189: blocks; Zebra-Llama's intermediate-layer distillation, arXiv 2505.17272: both). Layer i reads what the teacher's layer i
reads, so layers learn by themselves, and a gradient reaches nothing but the converted ones. Unlike attention_transfer it
takes a model besides the student, and so all of a layer may learn, its projections and its MLP too, and so may layers that
have no attention heads of the teacher's left (latent ones).

`relative_error/<layer>` is the mean over tokens of |student - teacher|^2 / |teacher|^2 of what the mixer adds
(`relative_error`: over the layers, too).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from adapt.components import objectives
from adapt.data.batch import PAD, Batch
from adapt.errors import Problem, UserError
from adapt.models import attention
from adapt.models.layout import Layout
from adapt.objectives.base import Facts, Models, Prepared, Stateless, Term
from adapt.objectives.layerwise import Layers, starting_at


@dataclass(frozen=True, kw_only=True)
class LayerAlignmentConfig:
    mixer: float = 1.0
    """Weight of the error of what the token mixer adds to the hidden state, after its output projection."""
    block: float = 0.0
    """Weight of the error of the hidden state behind the whole block. With both: Zebra-Llama's; alone: MOHAWK's."""
    distance: Literal["mse", "norm"] = "mse"
    """Of a token's two vectors. `mse`: mean squared difference of their channels; `norm`: length of their difference,
    which a few tokens with very large states dominate less."""

    scored: ClassVar[float] = 0.0
    """Rows of logits for each token (adapt.plan.work)."""

    @property
    def inside_layers(self) -> str:
        """What of a layer learns (adapt.plan.work)."""
        return "block" if self.block else "mixer"

    @property
    def compared(self) -> int:
        """States of a layer that are compared with the teacher's (adapt.plan.work)."""
        return bool(self.mixer) + bool(self.block)

    def problems(self, recipe) -> Iterator[Problem]:
        for key in ("mixer", "block"):
            if not (getattr(self, key) >= 0 and math.isfinite(getattr(self, key))):
                yield Problem(f"objective.{key}", f"{getattr(self, key)} must be 0 or more")
        if self.mixer == self.block == 0:
            what = "mixer and block are both 0, so nothing would be learned; mixer: 1 is usual, block: 1 adds the MLP"
            yield Problem("objective", what)
        if not any(c.declares("converts_layers") for c in recipe.model.conversions):
            what = "layer_alignment teaches converted layers, and model.conversions makes none; add lawcat, mamba2 or "
            yield Problem("objective", f"{what}xecomla")
        if recipe.trainable.include == ("*",):
            what = (
                "['*'] promises that everything trains, and layer_alignment gives a gradient to converted layers alone: "
                "trainable.include=['*.self_attn.*'], or ['*.layers.*'] with their MLPs"
            )
            yield Problem("trainable.include", what)
        if recipe.trainer.compile:
            what = (
                "layer_alignment looks into layers, and compiled ones cannot be looked into; set it to false, or make "
                "two runs, the second, compiled, from the export of the first"
            )
            yield Problem("trainer.compile", what)


class LayerAlignment(Stateless):
    needs_teacher = True

    def __init__(self, config: LayerAlignmentConfig, facts: Facts):
        self.weights = {name: w for name in ("mixer", "block") if (w := getattr(config, name))}
        self.norm, self.backend, self.layers = config.distance == "norm", facts.attention, facts.converted

    def prepare(self, batch: Batch, *, seed: int, step: int) -> Prepared:
        real = batch.role != PAD
        count = int(real.sum())
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "layout": Layout.causal(batch.doc_ids, batch.position_ids),
            "weight": real.float(),
        }
        terms = {name: Term(count * len(self.layers), weight) for name, weight in self.weights.items()}
        terms["relative_error"] = Term(count * len(self.layers), 0.0)
        return Prepared(inputs, terms | {_relative(i): Term(count, 0.0) for i in self.layers})

    def __call__(self, models: Models, inputs: dict[str, Any]) -> dict[str, Tensor]:
        ids, weight = inputs["input_ids"], inputs["weight"]
        rows = inputs["position_ids"], inputs["layout"], attention.make_plan(inputs["layout"], self.backend)
        teacher, student = Layers(models.teacher, *rows), Layers(models.student, *rows)
        _check(teacher, student)
        found: dict[str, Tensor] = {name: weight.new_zeros(()) for name in (*self.weights, "relative_error")}
        with torch.no_grad():
            hidden = teacher.embed(ids)
        for index in range(self.layers[-1] + 1):
            with torch.no_grad():
                block, mixed = teacher(index, hidden)
            if index in self.layers:
                ours, added = student(index, starting_at(hidden, sharded=models.lockstep))
                for name, (mine, theirs) in {"mixer": (added, mixed), "block": (ours, block)}.items():
                    if name in self.weights:
                        found[name] = found[name] + (_distance(mine, theirs, self.norm) * weight).sum()
                relative = found[_relative(index)] = (_relative_error(added.detach(), mixed) * weight).sum()
                found["relative_error"] = found["relative_error"] + relative
            hidden = block
        return found


@objectives.register("layer_alignment")
def layer_alignment(config: LayerAlignmentConfig, facts: Facts) -> LayerAlignment:
    return LayerAlignment(config, facts)


def _relative(index: int) -> str:
    return f"relative_error/{index:02d}"


def _distance(found: Tensor, taught: Tensor, norm: bool) -> Tensor:
    """[B, S, D] twice -> [B, S], in float32 or wider."""
    difference = _wide(found) - _wide(taught)
    return torch.linalg.vector_norm(difference, dim=-1) if norm else difference.square().mean(-1)


def _relative_error(found: Tensor, taught: Tensor) -> Tensor:
    taught = _wide(taught)
    return (_wide(found) - taught).square().sum(-1) / taught.square().sum(-1).clamp_min(1e-12)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(teacher: Layers, student: Layers) -> None:
    """Layer by layer is only possible between models of one shape."""
    theirs, ours = ((len(m), m.decoder.config.hidden_size) for m in (teacher, student))
    if theirs != ours:
        what = (
            f"it has {theirs[0]} layers of size {theirs[1]}, the student {ours[0]} of {ours[1]}, and layer_alignment "
            "compares them one by one; use self in this stage (logit_distillation can learn from a larger model)"
        )
        raise UserError(Problem("teacher.base", what))
