"""One model of a stage, as the plan sees it: its weights, which of them train, and how far gradients go back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapt.config.schema import Recipe
from adapt.plan.shapes import RECURRENCES, Dims, Weight, mixers, weights_of, with_adapters
from adapt.plan.work import fact
from adapt.train.trainable import select

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Group:
    """What FSDP2 gathers at once: a decoder layer, or (`layer` None) embedding, last norm and head with the root."""

    layer: int | None
    weights: tuple[Weight, ...]


@dataclass(frozen=True)
class PlannedModel:
    config: Any
    weights: tuple[Weight, ...]
    trained: frozenset[str]
    """Names; empty for a teacher."""
    dtype: str
    """Of the master weights."""
    backward: frozenset[int]
    """Layers that a gradient goes through."""
    called: bool = True
    """Whether a training step runs it; a teacher that only suites ask has its root gathered, and nothing else."""
    inside: bool = False
    """Each layer learns by itself: no gradient leaves it (attention_transfer)."""

    @classmethod
    def student(cls, recipe: Recipe, config: Any) -> PlannedModel:
        weights = with_adapters(weights_of(config), recipe.trainable.lora)
        created = {w.name for w in weights if w.created}
        trained = select([w.name for w in weights], recipe.trainable, created)
        inside = bool(fact(recipe.objective, "inside_layers", False))
        if inside:
            backward = {i for i, mixer in enumerate(mixers(config)) if mixer in RECURRENCES}
        else:
            lowest = min(-1 if w.role == "embedding" else _height(w, config) for w in weights if w.name in trained)
            backward = {i for i in range(config.num_hidden_layers) if i >= lowest}
        return cls(config, tuple(weights), frozenset(trained), recipe.model.dtype, frozenset(backward), inside=inside)

    @classmethod
    def frozen(cls, config: Any, dtype: str, *, called: bool = True) -> PlannedModel:
        return cls(config, tuple(weights_of(config)), frozenset(), dtype, frozenset(), called)

    @cached_property
    def dims(self) -> Dims:
        return Dims.of(self.config)

    @cached_property
    def mixers(self) -> list[str]:
        return mixers(self.config)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The root first, then the layers in order."""
        held: dict[int | None, list[Weight]] = {None: []}
        for weight in self.weights:
            held.setdefault(weight.layer, []).append(weight)
        return tuple(Group(layer, tuple(found)) for layer, found in held.items())

    @cached_property
    def root(self) -> Group:
        return self.groups[0]

    @cached_property
    def layers(self) -> tuple[Group, ...]:
        return self.groups[1:]

    def bytes_each(self, weight: Weight) -> int:
        """Of a master weight: what conversions and adapters add is in float32 always."""
        return 4 if weight.created or weight.adapter else BYTES[self.dtype]

    def learning(self, group: Group) -> Iterator[Weight]:
        return (w for w in group.weights if w.name in self.trained and self.learns(w))

    def learns(self, weight: Weight) -> bool:
        """Whether a gradient reaches it: what trains and gets none stays as it is."""
        return weight.name in self.trained and (not self.inside or weight.created)

    def parameters(self, *, trained: bool = False) -> int:
        return sum(w.numel for w in self.weights if not trained or w.name in self.trained)


def _height(weight: Weight, config: Any) -> int:
    return config.num_hidden_layers if weight.layer is None else weight.layer
