"""A model takes the extended tokenizer of `tokenizer.path` or `tokenizer.recipe` (tokenizer-extension spec, sections B.3 and C.1).

Old rows stay bit for bit. New rows are found by id, so that ids which fall into the padding of a matrix taller than its
tokenizer are initialised like the others, and the matrix never shrinks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapt.components import InitialiserChoice, conversions
from adapt.config.schema import Recipe, Tokenizer
from adapt.conversion.base import fill_rows, named
from adapt.conversion.new_tokens import WHERE, NewTokens, base_tokenizer, new_tokens, padded_rows, rows_problems
from adapt.errors import NotReachable, Problem, UserError

if TYPE_CHECKING:
    from adapt.conversion.initialisers.base import Initialiser


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    init: InitialiserChoice | None = None
    """How new rows of the embedding start. null: the mean of their pieces (`subword_mean`)."""
    output: InitialiserChoice | None = None
    """The same for a head that is not tied. null: like `init`; where that is null too, `mean`, which leaves the old
    predictions nearly as they were."""
    rescale: bool = False
    """Move new rows away from the mean, as far as trained ones usually are: averages are short."""
    pad_to_multiple: int = 1
    """Rows are rounded up to a multiple of this (64 or 128 suit GPUs); what no token has starts at the mean."""

    def problems(self, recipe) -> Iterator[Problem]:
        if not (recipe.tokenizer.path or recipe.tokenizer.recipe):
            what = "give its folder, or the recipe that makes it in tokenizer.recipe"
            yield Problem(WHERE, f"the conversion `vocabulary` needs the extended tokenizer; {what}")
        yield from rows_problems(
            self,
            recipe,
            "it cannot read the new tokens; take a teacher that has them (the export of a run that learned them)",
        )


class Vocabulary:
    fills_rows = True

    def __init__(self, config: VocabularyConfig, recipe: Recipe):
        self.config, self.recipe = config, recipe

    def plan(self, config, tokenizer):
        """A base tokenizer that is not on this machine yet is compared when the weights are loaded."""
        config = copy.deepcopy(config)
        self._refuse_output(config)
        if tokenizer is None or self.recipe.tokenizer == Tokenizer():  # the latter is refused by the config's rules
            return config, tokenizer
        try:
            size = self._new(config.vocab_size, offline=True).size
        except NotReachable:
            size = max(tokenizer.get_vocab().values()) + 1
        config.vocab_size = self._rows(size, config.vocab_size)
        return config, tokenizer

    def apply(self, model, tokenizer) -> None:
        import torch

        from adapt.conversion.initialisers.base import Table, rescaled
        from adapt.conversion.texts import Extension

        self._refuse_output(model.config)
        old = model.get_input_embeddings().num_embeddings
        new = self._new(old, offline=False)
        rows = self._rows(new.size, old)
        trained = self._trained(model, old)
        if rows > old:
            model.resize_token_embeddings(rows, mean_resizing=False)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        tied = head is None or head.weight is embedding
        tables = [(embedding, "input")] if tied else [(embedding, "input"), (head.weight, "output")]
        initialisers, extension = self._initialisers(), Extension(self.recipe, new.ids)
        with torch.no_grad():
            for weight, side in tables:
                table = Table(weight[:old].float(), trained, new.pieces, side, self.recipe.run.seed, extension)
                key, initialiser = initialisers[side]
                with named(key):
                    start = initialiser(table)
                weight[old:] = table.mean.to(weight.dtype)
                weight[list(new.ids)] = (rescaled(table, start) if self.config.rescale else start).to(weight.dtype)
        model.config.vocab_size = rows
        fill_rows(model, new.ids)

    def _new(self, rows: int, *, offline: bool) -> NewTokens:
        """From the tokenizers as they are read: what other conversions add is theirs to initialise."""
        from adapt.pretrained import load_tokenizer

        return new_tokens(
            base_tokenizer(self.recipe, offline=offline), load_tokenizer(self.recipe, offline=offline), rows
        )

    def _rows(self, size: int, old: int) -> int:
        return padded_rows(max(size, old), self.config)

    def _refuse_output(self, config) -> None:
        if self.config.output is not None and config.tie_word_embeddings:
            raise UserError(
                Problem("output", "this model's head is its embedding, so it has no start of its own; leave it out")
            )

    def _trained(self, model, rows: int):
        """[rows] bool: old tokens that texts contain, and whose rows look as if they had been trained."""
        from adapt.conversion.untrained import trained_rows

        return trained_rows(
            base_tokenizer(self.recipe, offline=False), model.config, model.get_input_embeddings().weight[:rows]
        )

    def _initialisers(self) -> dict[str, tuple[str, Initialiser]]:
        """side -> (key, initialiser); one object where `init` serves both, so that it need not learn twice."""
        from adapt.conversion.initialisers.mean import MeanConfig, mean
        from adapt.conversion.initialisers.subword_mean import SubwordMeanConfig, subword_mean

        chosen, output = self.config.init, self.config.output
        init = ("init", subword_mean(SubwordMeanConfig()) if chosen is None else chosen.build())
        if output is not None:
            return {"input": init, "output": ("output", output.build())}
        return {"input": init, "output": init if chosen is not None else ("output", mean(MeanConfig()))}


@conversions.register("vocabulary")
def vocabulary(config: VocabularyConfig, recipe: Recipe) -> Vocabulary:
    return Vocabulary(config, recipe)
