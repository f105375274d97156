"""Floating-point operations of one row, forward and backward, as they are executed.

A product of n tokens with an [out, in] weight is 2 n out in operations; its backward has two of that size, one towards its
input and one for the weight, where that learns. What is recomputed is counted: it takes time, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapt.plan.activations import kept_products
from adapt.plan.memory import Setup
from adapt.plan.model import Group, PlannedModel
from adapt.plan.shapes import RECURRENCES, Weight, latent_sizes
from adapt.plan.work import Work
from adapt.train.recompute import Policy

CHUNK = 64
"""Tokens of a recurrence's chunk, where its options do not say."""


@dataclass(frozen=True)
class Arithmetic:
    """Operations of one row, by what they are for."""

    student: float
    """Forward and backward, every product once."""
    recomputed: float
    """Layers (checkpointing) and logits that the backward pass works out again."""
    teacher: float

    @property
    def total(self) -> float:
        return self.student + self.recomputed + self.teacher


def of_row(student: PlannedModel, teacher: PlannedModel | None, work: Work, setup: Setup) -> Arithmetic:
    total, again = 0.0, 0.0
    for group in student.layers:
        if group.layer not in student.runs:
            continue
        linear, learned, mixing = _layer(student, group, work.read, work.pairs)
        total += linear + mixing
        if group.layer in student.backward:
            inputs = 2.0 * work.read * sum(w.numel for w in _matrices(group) if student.in_reach(w))
            total += learned + (0 if student.inside == "created" else inputs) + 2 * mixing
            again += _recomputed(group, linear, mixing, work.read, setup.checkpointing)
    logits = 2.0 * student.dims.V * student.dims.D * work.scored * work.seq_len
    if logits:
        learns = any(w.role in ("head", "embedding") for w in student.learning(student.root))
        total += logits * (2 + learns)
        again += logits if setup.compute == 2 or work.logits_twice else 0  # bf16: see linear_cross_entropy
    taught = 0.0
    if teacher is not None and work.taught:
        pairs = work.seq_len**2 / 2
        forward = sum(
            linear + mixing
            for linear, _, mixing in (
                _layer(teacher, g, work.seq_len, pairs) for g in teacher.layers if g.layer in teacher.runs
            )
        )
        taught = work.taught * (forward + 2.0 * teacher.dims.V * teacher.dims.D * work.seq_len * bool(work.scored))
    return Arithmetic(total, again, taught)


def _layer(model: PlannedModel, group: Group, tokens: int, pairs: float) -> tuple[float, float, float]:
    """(products with weights, those of them whose weights learn, token mixing) of a layer's forward pass."""
    matrices = _matrices(group)
    linear = 2.0 * tokens * sum(w.numel for w in matrices)
    learned = 2.0 * tokens * sum(w.numel for w in matrices if model.learns(w))
    return linear, learned, _mixing(model, group.layer, tokens, pairs)


def _matrices(group: Group) -> list[Weight]:
    return [w for w in group.weights if w.linear or (w.created and len(w.shape) >= 2)]


def _recomputed(group: Group, linear: float, mixing: float, tokens: int, policy: Policy) -> float:
    """A layer's forward once more, but for its last product, whose result the backward has no use for."""
    if not policy:
        return 0.0
    last = next(w for w in group.weights if ".mlp.down_proj." in w.name and w.linear)
    once = {w.name: w.numel for w in [last, *(kept_products(group) if policy == "selective" else [])]}
    return linear - 2.0 * tokens * sum(once.values()) + (0.0 if policy == "selective" else mixing)


def _mixing(model: PlannedModel, layer: int, tokens: int, pairs: float) -> float:
    s, mixer = model.dims, model.mixers[layer]
    if mixer in RECURRENCES and not model.inside:
        chunk = (model.config.mixer_options or {}).get(mixer, {}).get("chunk", CHUNK)
        return tokens * s.H * (4.0 * chunk * s.d + 4.0 * s.d * s.d)
    if mixer == "latent":
        o = latent_sizes(model.config, layer)
        return 2.0 * pairs * s.H * (o["nope_dim"] + o["rope_dim"] + o["v_dim"])
    return 4.0 * pairs * s.H * s.d
