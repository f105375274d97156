"""What a conversion is: one change from the pretrained model towards the student, applied in the recipe's order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from adapt.config.schema import Recipe
from adapt.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


class Conversion(Protocol):
    def plan(
        self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast | None
    ) -> tuple[PreTrainedConfig, PreTrainedTokenizerFast | None]:
        """The student's config and tokenizer, as new objects. Sees no weights; `validate` and `plan` use it.

        The tokenizer is null where it cannot be reached. Raises UserError for what can never work."""

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel | None:
        """The same change on the real model and tokenizer: in place, or by returning another model with its weights.

        Unless `reads_layers` is true of the conversion, the decoder layers may be on the meta device
        (adapt.pretrained.outline): their weights then follow by name."""


class Deciding(Conversion, Protocol):
    """A conversion with a question that weights alone can answer: which layers, which ranks."""

    decided: dict[str, Any] | None
    """What `decide` answered, set before `apply`; null where there was no question, and on the meta device."""

    def decide(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any] | None:
        """Plain values for checkpoints to keep, among them `text`, what the user is told; null: no question. Asked when
        a run begins; whoever builds its student again gets the same answer."""


def plan_conversions(recipe: Recipe, config, tokenizer):
    """(config, tokenizer) after all conversions; the arguments stay as they are. Raises UserError with the key."""
    for where, conversion in _conversions(recipe):
        with named(where):
            config, tokenizer = conversion.plan(config, tokenizer)
    return config, tokenizer


def planned_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The student's tokenizer, what conversions add included: what all data of the recipe is tokenised with."""
    from adapt.pretrained import load_config, load_tokenizer

    tokenizer = load_tokenizer(recipe)
    if not recipe.model.conversions:
        return tokenizer
    return plan_conversions(recipe, load_config(recipe.model), tokenizer)[1]


def apply_conversions(recipe: Recipe, model, tokenizer, decided: dict[str, Any] | None = None):
    """The student: `model` after all conversions, most of which change it in place. The tokenizer is changed, too.

    `decided`: answers of conversions that ask the weights, by the conversion's key; those that are missing are found
    now, on all ranks, and added as rank 0 found them."""
    decided = {} if decided is None else decided
    for where, conversion in _conversions(recipe):
        with named(where):
            if hasattr(conversion, "decide"):
                _decide(where, conversion, model, tokenizer, decided)
            model = conversion.apply(model, tokenizer) or model
    return model


def reads_layers(recipe: Recipe) -> bool:
    """Whether a conversion has to see the weights of the decoder layers."""
    return any(getattr(conversion, "reads_layers", False) for _, conversion in _conversions(recipe))


def _decide(where: str, conversion: Deciding, model, tokenizer, decided: dict[str, Any]) -> None:
    """Other machines sum in other orders, and ranks that disagreed would wait for each other forever."""
    if where not in decided and (answer := conversion.decide(model, tokenizer)) is not None:
        from adapt.distributed.world import from_main

        decided[where] = from_main(answer)
    conversion.decided = decided.get(where)


def _conversions(recipe: Recipe):
    for index, choice in enumerate(recipe.model.conversions):
        yield f"model.conversions[{index}]", choice.build(recipe)


def fill_rows(model, ids) -> None:
    """Remember that a conversion gave these rows of embedding and head their start (`trainable.rows: new`)."""
    model.filled_rows = tuple(sorted({*filled_rows(model), *ids}))


def filled_rows(model) -> tuple[int, ...]:
    """Rows of embedding and head that conversions have filled: those of new tokens, of a mask token."""
    return getattr(model, "filled_rows", ())


@contextmanager
def named(where: str) -> Iterator[None]:
    """Problems of what is inside are said with its key."""
    try:
        yield
    except UserError as error:
        raise UserError([_prefixed(where, p) for p in error.problems]) from None


def _prefixed(where: str, problem: Problem) -> Problem:
    """A key of the conversion's own gets its place; one of another section has it."""
    if problem.where.partition(".")[0] in {f.name for f in dataclasses.fields(Recipe)}:
        return problem
    return Problem(f"{where}.{problem.where}" if problem.where else where, problem.what)
