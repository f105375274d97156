"""What an objective does with a row, in the words its component declares; what it does not say is the usual.

copies          times that the row goes through the student (block diffusion: noisy and clean; 1)
scored          rows of logits for each clean token (1)
heads           calls of the head that keep a gradient of it (1)
visible         (query, key) pairs of a row of T tokens (T^2 / 2: one causal document)
logits_twice    the way back forms them once more (false; bf16 does so anyway)
inside_layers   each layer learns by itself, and no gradient leaves it: from what it is given (`created`: the parameters
                of recurrences), or from a teacher's states, of its `mixer` alone or of the whole `block` ("")
compared        of each layer's states with the teacher's, where layers learn from those (1)
teacher_reads   `all` rows, or those of sources marked `replay`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapt.config.schema import Recipe
from adapt.registry import Selection


@dataclass(frozen=True)
class Work:
    seq_len: int
    """Clean tokens of a row, T."""
    copies: int
    scored: float
    heads: int
    pairs: float
    """Of queries and keys that see each other, in a row: as if it were one document."""
    taught: float
    """Share of the rows that the teacher reads; 0 without one."""
    divergence: bool
    """The loss compares with the teacher's logits."""
    logits_twice: bool
    """The loss is of sums over a row, whose way back forms the logits once more (linear_log_probability)."""
    compared: int
    """States of a layer that are compared with the teacher's."""
    unit: int
    """Rows that are never parted: those of a preference pair."""

    @classmethod
    def of(cls, recipe: Recipe) -> Work:
        choice, length = recipe.objective, recipe.data.seq_len
        visible = fact(choice, "visible", None)
        taught = 1.0 if choice.declares("needs_teacher") else 0.0
        if taught and fact(choice, "teacher_reads", "all") == "replay":
            taught = replayed(recipe)
        return cls(
            seq_len=length,
            copies=int(fact(choice, "copies", 1)),
            scored=float(fact(choice, "scored", 1.0)),
            heads=int(fact(choice, "heads", 1)),
            pairs=length**2 / 2 if visible is None else visible(length),
            taught=taught,
            divergence=choice.declares("needs_teacher") and not choice.declares("logits_twice"),
            logits_twice=choice.declares("logits_twice"),
            compared=int(fact(choice, "compared", 1)),
            unit=2 if choice.declares("pairs") else 1,
        )

    @property
    def read(self) -> int:
        """Tokens of a row as the student reads it."""
        return self.seq_len * self.copies


def fact(choice: Selection, name: str, usual: Any) -> Any:
    """Of the config, where it decides that, or of what will be built."""
    if hasattr(choice.config, name):
        return getattr(choice.config, name)
    return getattr(choice.registry[choice.name].builds, name, usual)


def replayed(recipe: Recipe) -> float:
    """Share of the replay among the training tokens, by the weights of the first phase."""
    weights = [d.weight if not isinstance(d.weight, tuple) else d.weight[0].weight for d in recipe.data.train]
    total = sum(weights)
    return sum(w for w, d in zip(weights, recipe.data.train, strict=True) if d.replay) / total if total else 0.0
