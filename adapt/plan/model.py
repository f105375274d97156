"""One model of a stage, as the plan sees it: its weights, which of them train, and how far gradients go back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from adapt.config.schema import Recipe
from adapt.plan.shapes import RECURRENCES, Dims, Weight, mixers, weights_of, with_adapters
from adapt.plan.work import fact
from adapt.train.trainable import select

Inside = Literal["", "created", "mixer", "block"]
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
    runs: frozenset[int]
    """Layers that a training step runs; of a teacher that only suites ask none, and its root is gathered all the same."""
    inside: Inside = ""
    """What of a layer learns, where each learns by itself and no gradient leaves it (adapt.plan.work)."""

    @classmethod
    def student(cls, recipe: Recipe, config: Any) -> PlannedModel:
        weights = with_adapters(weights_of(config), recipe.trainable.lora)
        created = {w.name for w in weights if w.created}
        trained = select([w.name for w in weights], recipe.trainable, created)
        inside: Inside = fact(recipe.objective, "inside_layers", "")
        runs = frozenset(range(config.num_hidden_layers))
        if inside == "created":
            backward = {i for i, mixer in enumerate(mixers(config)) if mixer in RECURRENCES}
        elif inside:
            runs = backward = converted(config)
        else:
            lowest = min(-1 if w.role == "embedding" else _height(w, config) for w in weights if w.name in trained)
            backward = {i for i in runs if i >= lowest}
        return cls(config, tuple(weights), frozenset(trained), recipe.model.dtype, frozenset(backward), runs, inside)

    @classmethod
    def frozen(cls, config: Any, dtype: str, *, layers: int | None = None) -> PlannedModel:
        """A teacher, the first `layers` layers of which run (null: all)."""
        runs = frozenset(range(config.num_hidden_layers if layers is None else layers))
        return cls(config, tuple(weights_of(config)), frozenset(), dtype, frozenset(), runs)

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
        if weight.name not in self.trained or not self.inside:
            return weight.name in self.trained
        if self.inside == "created":
            return weight.created
        return weight.layer in self.backward and self.in_reach(weight)

    def in_reach(self, weight: Weight) -> bool:
        """Of a layer's weights: whether what is compared comes after it. The token mixer's output knows no MLP."""
        return self.inside != "mixer" or ".self_attn." in weight.name or ".input_layernorm." in weight.name

    def parameters(self, *, trained: bool = False) -> int:
        return sum(w.numel for w in self.weights if not trained or w.name in self.trained)


def converted(config: Any) -> frozenset[int]:
    """Layers whose token mixer is not the base's attention."""
    return frozenset(i for i, mixer in enumerate(mixers(config)) if mixer != "attention")


def _height(weight: Weight, config: Any) -> int:
    return config.num_hidden_layers if weight.layer is None else weight.layer
