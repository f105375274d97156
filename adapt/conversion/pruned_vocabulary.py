"""A model takes the pruned tokenizer of `tokenizer.path`: the rows of the tokens that are left, bit for bit.

Which row is whose follows from the two tokenizers, token by token; ids in the model's config and generation config
(BOS, EOS, PAD and their like) follow their tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adapt.components import conversions
from adapt.config.schema import Recipe
from adapt.conversion.new_tokens import WHERE, base_tokenizer, padded_rows, rows_problems
from adapt.errors import NotReachable, Problem, UserError

SPECIAL = "_token_id"
"""How keys of a config end that hold ids."""
LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Ids in a generation config; those of tokens that are gone are left out."""


@dataclass(frozen=True, kw_only=True)
class PrunedVocabularyConfig:
    pad_to_multiple: int = 1
    """Rows are rounded up to a multiple of this (64 or 128 suit GPUs); what no token has starts at the mean."""

    def problems(self, recipe) -> Iterator[Problem]:
        if not recipe.tokenizer.path:
            yield Problem(WHERE, "the conversion `pruned_vocabulary` needs the pruned tokenizer; give its folder")
        if recipe.model.conversions and recipe.model.conversions[0].config != self:
            what = "the conversion `pruned_vocabulary` comes first: before it the new ids stand for other rows"
            yield Problem("", what)
        yield from rows_problems(
            self,
            recipe,
            "its ids are others; take a teacher with the pruned vocabulary (the export of a run that has it)",
        )


class PrunedVocabulary:
    def __init__(self, config: PrunedVocabularyConfig, recipe: Recipe):
        self.config, self.recipe = config, recipe

    def plan(self, config, tokenizer):
        """A base tokenizer that is not on this machine yet is compared when the weights are loaded."""
        config = copy.deepcopy(config)
        if tokenizer is None or not self.recipe.tokenizer.path:  # the latter is refused by the config's rules
            return config, tokenizer
        try:
            moved = self._moved(config.vocab_size, offline=True)
            _renumber(config, moved)
        except NotReachable:
            moved = Moved({}, {}, max(tokenizer.get_vocab().values()) + 1)
            for key in ("bos", "eos", "pad"):  # the base's ids mean nothing here
                if getattr(config, key + SPECIAL, None) is not None:
                    setattr(config, key + SPECIAL, getattr(tokenizer, key + SPECIAL))
        config.vocab_size = padded_rows(moved.size, self.config)
        return config, tokenizer

    def apply(self, model, tokenizer) -> None:
        import torch

        from adapt.conversion.untrained import trained_rows

        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        moved = self._moved(embedding.num_embeddings, offline=False)
        rows = padded_rows(moved.size, self.config)
        trained = trained_rows(base_tokenizer(self.recipe, offline=False), model.config, embedding.weight)
        padded = embedding.padding_idx is not None  # that row gets no gradient
        tied = head is None or head.weight is embedding.weight
        old, new = list(moved.rows), list(moved.rows.values())
        with torch.no_grad():
            tables = []
            for weight in [embedding.weight] if tied else [embedding.weight, head.weight]:
                table = weight.float()[trained].mean(0).to(weight.dtype).repeat(rows, 1)
                table[new] = weight[old]
                tables.append(table)
            model.resize_token_embeddings(rows, mean_resizing=False)
            model.get_input_embeddings().weight.copy_(tables[0])
            if not tied:
                model.get_output_embeddings().weight.copy_(tables[1])
        for config in (model.config, model.generation_config):
            if config is not None:
                _renumber(config, moved)
        if padded:
            model.get_input_embeddings().padding_idx = model.get_decoder().padding_idx = model.config.pad_token_id

    def _moved(self, rows: int, *, offline: bool) -> Moved:
        """From the tokenizers as they are read: what other conversions add is theirs to initialise."""
        from adapt.pretrained import load_tokenizer

        return moved_tokens(
            base_tokenizer(self.recipe, offline=offline), load_tokenizer(self.recipe, offline=offline), rows
        )


@conversions.register("pruned_vocabulary")
def pruned_vocabulary(config: PrunedVocabularyConfig, recipe: Recipe) -> PrunedVocabulary:
    return PrunedVocabulary(config, recipe)


@dataclass(frozen=True)
class Moved:
    rows: Mapping[int, int]
    """Old id -> new id of the tokens that are left."""
    names: Mapping[int, str]
    """Old id -> token, of all the base had."""
    size: int
    """Rows that the pruned tokenizer needs: its largest id, plus 1."""


def moved_tokens(base: Any, pruned: Any, rows: int) -> Moved:
    """Of two transformers tokenizers, and the rows there are. Raises UserError where the second has other tokens than
    the first, all of them, or one without a row."""
    old, new = base.get_vocab(), pruned.get_vocab()
    problems = []
    if more := sorted(new.keys() - old.keys(), key=new.__getitem__):
        what = (
            f"has {len(more):,} tokens that the base lacks, {more[0]!r} (id {new[more[0]]}) first: it is another tokenizer, or "
            "one that was extended too. Prune first, export the model, and extend that one's"
        )
        problems.append(Problem(WHERE, what))
    elif len(new) == len(old):
        what = f"has all of the base's {len(old):,} tokens, so there is nothing to drop; leave this conversion out, or "
        problems.append(Problem(WHERE, f"{what}give the pruned tokenizer"))
    if bare := sorted(old[t] for t in new.keys() & old.keys() if old[t] >= rows):
        what = f"keeps {len(bare):,} tokens that never had an embedding row: id {bare[0]} of the base is beyond its {rows:,}"
        problems.append(Problem(WHERE, f"{what}. Extend the base's vocabulary first, or drop them"))
    if len(set(new.values())) != len(new):
        problems.append(Problem(WHERE, "has ids with two tokens; build it again"))
    if problems:
        raise UserError(problems)
    kept = {old[token]: i for token, i in new.items()}
    return Moved(kept, {i: token for token, i in old.items()}, max(new.values()) + 1)


def _renumber(config: Any, moved: Moved) -> None:
    """The ids in a config or generation config, in place. Raises UserError for one whose token is gone."""
    problems = []
    for key, value in config.to_dict().items():
        if key.endswith(SPECIAL) and value is not None:
            ids = value if isinstance(value, list) else [value]
            if lost := [i for i in ids if i >= 0 and i not in moved.rows]:  # -1 stands for none
                name = moved.names.get(lost[0])
                what = f"the model's {key} {lost[0]} is {name!r}, which it lacks: prune again, with keep: [{name!r}]"
                if name is None:
                    what = f"the model's {key} {lost[0]} is no token of the base's; correct the base's config"
                problems.append(Problem(WHERE, what))
                continue
            now = [moved.rows.get(i, i) for i in ids]
            setattr(config, key, now if isinstance(value, list) else now[0])
        elif key in LISTS and value:
            setattr(config, key, [moved.rows[i] for i in value if i in moved.rows])
    if problems:
        raise UserError(problems)
