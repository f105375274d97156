"""What conversions of attention into recurrences share: which layers, what is refused, and `layers: auto`, which lets
the layers that are hardest to imitate keep their attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from adapt.config.schema import Recipe
from adapt.conversion.layer_map import AUTO, AutoMap, auto_map, chosen_layers, planned
from adapt.errors import Problem

if TYPE_CHECKING:
    from adapt.data.batch import Batch

SHARE = 0.25
"""Of all layers, those that keep their attention under `layers: auto`."""


class Recurrent:
    """`mixer`: what layers become; `options(config)`: its settings. Both are the subclass's."""

    transfers = True
    converts_layers = True
    mixer: str
    decided: dict[str, Any] | None = None

    def __init__(self, config: Any, seed: int, rows: Callable[[int], Iterable[Batch]] | None = None):
        """`rows(steps)`: two rows of training text for each step of `layers: auto`."""
        self.config, self.seed, self.rows = config, seed, rows

    @property
    def reads_layers(self) -> bool:
        """`auto` measures them, once."""
        return self.config.layers == AUTO and self.decided is None

    def options(self, config: Any) -> dict[str, Any]:
        raise NotImplementedError

    def plan(self, config, tokenizer):
        """Under `auto` the layers are known with the weights only; here they are as many, evenly spread."""
        return planned(config, self.mixer, self._layers(config), self.options(config)), tokenizer

    def apply(self, model, tokenizer):
        self.decided = self.decided or self.decide(model, tokenizer)
        config, _ = self.plan(model.config, tokenizer)
        if self.decided:
            config.transfer_errors = self.decided["errors"]
        return self.started(model, config, tokenizer)

    def started(self, model, config, tokenizer):
        """The student of `config`, all that is new at its start."""
        from adapt.conversion.mixers import with_mixers

        return with_mixers(model, config, self.seed)

    def decide(self, model, tokenizer) -> dict[str, Any] | None:
        """`layers`, those to convert; `errors`, what was measured of each layer of the model (null: not a candidate)."""
        if self.config.layers != AUTO or model.device.type == "meta":
            return None
        from adapt.conversion.transfer_errors import transfer_errors

        found = self._auto(model.config)
        everything = planned(model.config, self.mixer, found.candidates, self.options(model.config))
        student = self.started(model, everything, tokenizer)
        errors = transfer_errors(student, self.rows(self.config.auto_steps), found.candidates, self.seed)
        chosen = found.easiest(errors)
        stay = [i for i in found.candidates if i not in chosen]
        measured = ", ".join(f"{i} {errors[i]:.3g}" for i in sorted(errors, key=errors.get, reverse=True))
        return {
            "layers": list(chosen),
            "errors": [errors.get(i) for i in range(model.config.num_hidden_layers)],
            "text": f"layers {_listed(stay)} keep their attention, the hardest to imitate; {_listed(chosen)} become "
            f"{self.mixer} (relative error of the heads by layer: {measured})",
        }

    def _layers(self, config: Any) -> tuple[int, ...]:
        if self.config.layers != AUTO:
            return chosen_layers(self.config.layers, self.config.keep, config.num_hidden_layers)
        return tuple(self.decided["layers"]) if self.decided else self._auto(config).spread()

    def _auto(self, config: Any) -> AutoMap:
        share = SHARE if self.config.attention_share is None else self.config.attention_share
        return auto_map(config, self.config.keep, share)


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def text_for_steps(recipe: Recipe) -> Callable[[int], Iterable[Batch]]:
    """Of the recipe's training data, two rows a step."""

    def rows(steps: int) -> Iterable[Batch]:
        from adapt.conversion.calibration import training_rows

        return training_rows(recipe, steps * 2 * recipe.data.seq_len)

    return rows


def mixer_problems(config: Any, recipe: Recipe) -> Iterator[Problem]:
    """Of the keys that both conversions have."""
    if config.chunk < 16 or config.chunk % 16:
        yield Problem("", f"chunk={config.chunk} must be a multiple of 16; 64 is usual")
    if config.conv_width < 1:
        yield Problem("", f"conv_width={config.conv_width} must be 1 or more (1: the token alone); 4 is usual")
    share = config.attention_share
    if share is not None and config.layers != AUTO:
        what = (
            f"attention_share={share} is how many layers `layers: auto` leaves; with layers={config.layers} name them"
        )
        yield Problem("", f"{what} in keep")
    elif share is not None and not 0 < share < 1:
        yield Problem("", f"attention_share={share} must be above 0 and below 1 (0: layers: all); 0.25 is usual")
    if config.auto_steps < 1:
        yield Problem("", f"auto_steps={config.auto_steps} must be 1 or more; 24 is usual")
    if config.layers == AUTO:
        yield from _refuse_followers(config, recipe)
    yield from refuse_blocks(recipe)


def _refuse_followers(config: Any, recipe: Recipe) -> Iterator[Problem]:
    """A list of layers means nothing while nobody knows which are left."""
    own = next(i for i, choice in enumerate(recipe.model.conversions) if choice.config is config)
    for index, choice in enumerate(recipe.model.conversions[own + 1 :], own + 1):
        if hasattr(choice.config, "layers"):
            what = (
                "which layers `layers: auto` leaves is known with the weights only, so a conversion that names layers "
            )
            yield Problem("", f"{what}comes before it: put model.conversions[{index}] ({choice.name}) first")


def refuse_blocks(recipe: Recipe) -> Iterator[Problem]:
    """A block sees itself both ways, and a recurrence runs from left to right."""
    if hasattr(recipe.objective.config, "block_size"):
        yield Problem(
            "",
            f"the objective {recipe.objective.name} looks both ways within a block, and a recurrent layer only back; "
            "train with next_token, logit_distillation or attention_transfer",
        )
