"""Memory of one rank by kind, at the worst of the moments at which a step can be worst.

    loss        the last rows of logits: every activation is there, and the root is whole
    last layer  its backward (with checkpointing: recomputed), the next one's gathered buffer, gradients on their way
    first layer the same where backward ends: activations are gone, and the gradients of the other layers have come
    root        the gradients of embedding and head, whole, in float32 too, on their way to their shards
    optimizer   everything is sharded, and the optimizer stacks what it works on

Streams overlap on a GPU: a layer's reduce-scatter runs beside the next one's backward, so that both are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapt.plan.activations import layer_bytes, mixer_bytes, mlp_bytes, norm_bytes, selective_bytes
from adapt.plan.cluster import Grid
from adapt.plan.model import Group, PlannedModel
from adapt.plan.optimizer import OptimizerPlan
from adapt.plan.traffic import REDUCED, local, padded
from adapt.plan.work import Work
from adapt.train.recompute import Policy

CHUNK = {"cpu": 256, "cuda": 2048}
"""Rows of logits at one time (adapt.losses.linear_cross_entropy)."""


REDUCING = 2
"""Layers whose gradients have not reached their shards yet when the first one's backward is at its widest."""
UNREAD = 2
"""Layers whose MLP is there although no loss reads it, where the mixers alone are compared: this one's, and the one's before
until its result is replaced."""


@dataclass(frozen=True)
class Setup:
    """What memory depends on besides the models."""

    grid: Grid
    compute: int
    """Bytes of an element in the compute dtype."""
    device: str
    """`cuda` or `cpu`: how attention and loss run."""
    checkpointing: Policy
    offload: bool = False
    """Shards, their gradients and the optimizer's state are in the host's memory."""


@dataclass(frozen=True)
class Moment:
    name: str
    kinds: dict[str, float]
    """Kind -> bytes."""

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def moments(
    student: PlannedModel,
    teacher: PlannedModel | None,
    work: Work,
    optimizer: OptimizerPlan,
    setup: Setup,
    rows: int,
    accumulated: bool = True,
) -> list[Moment]:
    """Of a step with microbatches of `rows` rows; `accumulated`: the gradients of one before are there already."""
    ended = held_bytes(student, teacher, optimizer, setup)
    if setup.offload:  # weights visit the GPU, and gradients leave it as they come
        ended = {}
    held = ended if accumulated else ended | {"gradients": 0.0}
    c, tokens = setup.compute, rows * work.read
    activations = kept(student, work, setup, rows)
    if student.inside == "mixer":
        unread = 0 if setup.checkpointing else UNREAD
        activations += unread * tokens * max(mlp_bytes(student, g, c) for g in student.layers)
    layers = [g for g in student.layers if g.layer in student.backward] or list(student.layers[-1:])
    widest = max(layers, key=lambda g: _whole(g, setup))
    root, next_one = c * _whole(student.root, setup), c * _whole(widest, setup)
    # What forms logits on the way back does so when the teacher's root is in its shards again.
    of_teacher = c * _whole(teacher.root, setup) if teacher is not None and not work.logits_twice else 0
    if teacher is not None and student.inside in ("mixer", "block"):  # the two models' layers take turns
        of_teacher += c * max(_whole(g, setup) for g in teacher.layers)
    loss, head = loss_bytes(student, teacher, work, setup, rows)
    found = [
        Moment(
            "loss",
            held
            | {
                "whole weights": root + next_one + of_teacher,
                "activations": activations,
                "logits and loss": loss + head,
            },
        )
    ]
    full = layer_bytes(student, widest, c, tiled=setup.device == "cpu") * tokens
    own = full + c * student.dims.D * tokens if setup.checkpointing else full
    learning = sum(padded(w, setup.grid) for w in student.learning(widest))
    passing = {
        "whole weights": root + 2 * next_one,
        "logits and loss": head,
        "whole gradients": (c + REDUCED) * learning,
        "working memory": working(student, c) * tokens,
    }
    of_layers = kept(student, work, setup, rows, layers_only=True)
    last = of_layers + (full if setup.checkpointing or student.inside == "created" else 0.0)
    if setup.checkpointing == "selective":  # what was kept of it is part of what is there again
        last -= selective_bytes(student, widest, c) * tokens
    found.append(Moment("last layer", held | passing | {"activations": last}))
    reduced = sum(_gradients(student, g, setup) for g in student.layers[REDUCING:])
    there = held.get("gradients", 0.0) if accumulated or setup.offload else reduced
    found.append(Moment("first layer", held | {"gradients": there} | passing | {"activations": own}))
    ends = sum(padded(w, setup.grid) for w in student.learning(student.root))
    found.append(Moment("root", ended | {"whole weights": next_one, "whole gradients": (c + REDUCED) * ends}))
    if not setup.offload:
        found.append(Moment("optimizer", ended | {"working memory": float(optimizer.step_buffers)}))
    return found


def _whole(group: Group, setup: Setup) -> int:
    return sum(padded(w, setup.grid) for w in group.weights)


def _gradients(student: PlannedModel, group: Group, setup: Setup) -> float:
    """Of a rank's shards."""
    return float(sum(local([w], setup.grid) * student.bytes_each(w) for w in student.learning(group)))


def held_bytes(
    student: PlannedModel, teacher: PlannedModel | None, optimizer: OptimizerPlan, setup: Setup
) -> dict[str, float]:
    """What a rank always has while it trains, on its GPU or its host: its shards."""
    grid = setup.grid
    found = {
        "weights": float(sum(local([w], grid) * student.bytes_each(w) for w in student.weights)),
        "gradients": sum(_gradients(student, group, setup) for group in student.groups),
        "optimizer": float(optimizer.state),
    }
    if teacher is not None:
        found["teacher"] = float(sum(local([w], grid) * teacher.bytes_each(w) for w in teacher.weights))
    return found


def kept(student: PlannedModel, work: Work, setup: Setup, rows: int, *, layers_only: bool = False) -> float:
    """Activations between forward and backward: of every layer that a gradient goes through, or its input alone;
    `layers_only`: without what the last norm and the head keep."""
    if student.inside == "created":  # their gradients are formed on the way forward
        return 0.0
    c, s = setup.compute, student.dims
    tokens = rows * work.read
    if setup.checkpointing:
        away = setup.checkpointing == "offload" and setup.device != "cpu"
        layers = 0.0 if away else float(c * s.D * len(student.backward))
        if setup.checkpointing == "selective":
            layers += sum(selective_bytes(student, g, c) for g in student.layers if g.layer in student.backward)
    else:
        of_layer = mixer_bytes if student.inside == "mixer" else layer_bytes
        layers = sum(
            of_layer(student, g, c, tiled=setup.device == "cpu") for g in student.layers if g.layer in student.backward
        )
    if student.inside in ("mixer", "block"):  # differences from the teacher's states, in float32
        layers += 4 * s.D * len(student.backward) * work.compared
    if student.inside or layers_only:
        return layers * tokens
    last = norm_bytes(s.D, c, any("norm" in w.name for w in student.learning(student.root)), True) + c * s.D
    return (layers + last) * tokens + c * s.D * work.scored * rows * work.seq_len


def loss_bytes(
    student: PlannedModel, teacher: PlannedModel | None, work: Work, setup: Setup, rows: int
) -> tuple[float, float]:
    """(what lives while the loss is computed, what the head's gradient holds until the root's turn)."""
    if not work.scored:
        return 0.0, 0.0
    c, s = setup.compute, student.dims
    scored = rows * work.seq_len * work.scored
    chunk = min(CHUNK[setup.device], scored)
    learns = any(
        w.role == "head" or (w.role == "embedding" and student.config.tie_word_embeddings)
        for w in student.learning(student.root)
    )
    matrix = s.V * s.D if learns else 0
    each = c * matrix
    summed = 0.0 if work.heads == 1 else each * (work.heads - (c == 2))  # float32: what they add up to, beside them
    entropy, divergence = 0.0, 0.0
    if work.logits_twice:
        entropy = 2 * 4 * chunk * s.V + 4 * matrix
    elif work.heads > work.divergence:
        entropy = 4 * chunk * s.V
        if c == 2:
            entropy += 2 * chunk * s.V  # logits once more, in the compute dtype
            entropy += (4 * s.V * s.D + 4 * matrix) if setup.device == "cpu" else 0  # head and its gradient in float32
    if work.divergence and teacher is not None:
        divergence = 4 * 4 * chunk * s.V + 2 * 4 * matrix + c * work.taught * scored * teacher.dims.D
    loss = summed + max(entropy, divergence) + c * scored * s.D
    return loss, float(each)


def working(student: PlannedModel, c: int) -> float:
    """Of a token: gradients of activations on their way through a layer. The widest are the MLP's."""
    return 2 * c * student.dims.I
