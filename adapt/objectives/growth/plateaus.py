"""Block sizes by a list, shrinking ones too: I-DLM's 1, 2, 3; LLaDA2.0's 1, 4, 32, 64, 4096 and back to 32."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from adapt.components import block_sizes
from adapt.errors import Problem


@dataclass(frozen=True, kw_only=True)
class PlateausConfig:
    sizes: tuple[int, ...]
    """Block sizes in the order of their use; the last one is the target `block_size`."""
    steps: tuple[int, ...]
    """Optimizer step at which each begins; the first is 0."""

    def problems(self, recipe) -> Iterator[Problem]:
        target = getattr(recipe.objective.config, "block_size", None)
        if len(self.sizes) != len(self.steps) or not self.sizes:
            yield Problem(
                "objective.growth.steps",
                f"{len(self.steps)} steps for {len(self.sizes)} sizes; give one for each, at least one",
            )
            return
        if min(self.sizes) < 1:
            yield Problem("objective.growth.sizes", f"{list(self.sizes)} must all be 1 or more")
        if self.steps[0] != 0 or any(b <= a for a, b in itertools.pairwise(self.steps)):
            yield Problem("objective.growth.steps", f"{list(self.steps)} must begin with 0 and rise")
        if target is not None and self.sizes[-1] != target:
            yield Problem(
                "objective.growth.sizes", f"ends with {self.sizes[-1]}, and the target block_size is {target}"
            )


@dataclass(frozen=True)
class Plateaus:
    config: PlateausConfig

    def at(self, step: int) -> int:
        begun = sum(s <= step for s in self.config.steps)
        return self.config.sizes[max(1, begun) - 1]

    def largest_step(self) -> int:
        return max(zip(self.config.sizes, self.config.steps, strict=True))[1]


@block_sizes.register("plateaus")
def plateaus(config: PlateausConfig, target: int) -> Plateaus:
    return Plateaus(config)
