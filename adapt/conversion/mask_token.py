"""A mask token for a model that was trained without one (block-diffusion spec, section 2).

Nothing is added that is already there: an explicit choice first, then the mask token the model was trained with (its
config's mask_token_id), the tokenizer's own, an unused mask or reserved token, an embedding row no token has (Qwen2.5
has 271), and only then one new row.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Literal

from adapt.components import conversions
from adapt.conversion.base import fill_rows
from adapt.errors import Problem, UserError

NEW_TOKEN = "<|mask|>"

MASK_NAMES = ("<|mask|>", "<mask>", "[MASK]", "<|MASK|>", "<|mdm_mask|>")
RESERVED = re.compile(r"^(<\|?reserved(_special)?(_token)?_?\d+\|?>|<\|?unused_?\d+\|?>|\[unused_?\d+\])$")


@dataclass(frozen=True, kw_only=True)
class MaskTokenConfig:
    token: str | None = None
    """Token to use (`<reponame>`); one the vocabulary lacks is added under this name. null: choose."""
    id: int | None = None
    """The same by id; the first id after the tokenizer's own takes a spare embedding row. null: choose."""
    init: Literal["mean", "keep"] = "mean"
    """Its input embedding: `mean` of all tokens' (a reused token must not start from another meaning, nor from a row
    that never trained), or `keep` what an existing row holds. The row of a model's own mask token is always kept."""


@dataclass(frozen=True)
class Choice:
    id: int
    token: str
    how: Literal["existing", "spare", "new"]
    """A token the tokenizer has; an embedding row without a token; a row to be added."""


class MaskToken:
    fills_rows = True

    def __init__(self, config: MaskTokenConfig):
        self.config = config

    def plan(self, config, tokenizer):
        config = copy.deepcopy(config)
        if tokenizer is None:  # all that can be said without it
            if self.config.id is not None:
                _refuse_taken(self.config.id, config, None)
                config.mask_token_id = self.config.id
            return config, None
        choice = choose(self.config, config, tokenizer)
        tokenizer = copy.deepcopy(tokenizer)
        _name(tokenizer, choice)
        config.vocab_size = max(config.vocab_size, choice.id + 1)
        config.mask_token_id = choice.id
        return config, tokenizer

    def apply(self, model, tokenizer) -> None:
        import torch

        choice = choose(self.config, model.config, tokenizer)
        known = getattr(model.config, "mask_token_id", None) == choice.id
        trained = torch.ones(model.config.vocab_size, dtype=torch.bool)
        trained[len(tokenizer) :] = False  # rows beyond the vocabulary are padding
        trained[choice.id : choice.id + 1] = False
        if choice.how == "new":
            model.resize_token_embeddings(choice.id + 1, mean_resizing=False)
            trained = torch.cat([trained, trained.new_zeros(choice.id + 1 - len(trained))])
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight
            if choice.how == "new" or (self.config.init == "mean" and not known):
                embedding[choice.id] = _mean(embedding, trained)
                fill_rows(model, [choice.id])
            head = model.get_output_embeddings()
            # an untied head's existing row already says how unlikely the token is; a new one starts in the middle
            if choice.how == "new" and head is not None and head.weight is not embedding:
                head.weight[choice.id] = _mean(head.weight, trained)
        _name(tokenizer, choice)
        model.config.vocab_size = model.get_input_embeddings().num_embeddings
        model.config.mask_token_id = choice.id


@conversions.register("mask_token")
def mask_token(config: MaskTokenConfig, recipe) -> MaskToken:
    return MaskToken(config)


def choose(wish: MaskTokenConfig, config, tokenizer) -> Choice:
    """Which id. Raises UserError with the keys of this conversion."""
    rows, vocab = config.vocab_size, tokenizer.get_vocab()
    spare = max([len(tokenizer) - 1, *vocab.values()]) + 1  # the id the tokenizer gives to the next token added
    if wish.id is not None:
        choice = _by_id(wish, rows, spare, tokenizer)
    elif wish.token is not None and wish.token in vocab:
        choice = _named(wish.token, vocab, rows)
    elif wish.token is None and getattr(config, "mask_token_id", None) is not None:
        choice = _models_own(config.mask_token_id, rows, spare, tokenizer)
    elif wish.token is None and (name := _existing(config, tokenizer, vocab, rows)):
        choice = _named(name, vocab, rows)
    else:
        if not (name := wish.token if wish.token is not None else NEW_TOKEN).strip():
            raise UserError(Problem("token", "is empty"))
        choice = Choice(spare, name, "spare" if spare < rows else "new")
    if choice.id > rows:
        what = f"the tokenizer has {spare} tokens, but the model only {rows} embedding rows"
        raise UserError(Problem("", f"{what}; a conversion that extends the vocabulary comes before this one"))
    if choice.how != "new" and not 0 <= choice.id < rows:
        raise UserError(Problem("id", f"{choice.token!r} has id {choice.id}, but the model has {rows} embedding rows"))
    _refuse_taken(choice.id, config, tokenizer)
    if choice.how == "existing" and choice.id != getattr(config, "mask_token_id", None):  # its own may be anything
        _refuse_word(choice, tokenizer)
    return choice


def _named(name: str, vocab: dict[str, int], rows: int) -> Choice:
    """A token of the vocabulary; one right behind the last row was added by an earlier pass over the same tokenizer."""
    return Choice(vocab[name], name, "new" if vocab[name] == rows else "existing")


def _models_own(own: int, rows: int, spare: int, tokenizer) -> Choice:
    if tokenizer.mask_token_id not in (None, own):
        raise UserError(
            Problem(
                "",
                f"the model's config has mask_token_id={own}, but the tokenizer's mask token {tokenizer.mask_token!r} "
                f"is {tokenizer.mask_token_id}; say which: {{name: mask_token, id: {own}}}, or "
                f"{{name: mask_token, id: {tokenizer.mask_token_id}}}",
            )
        )
    return _by_id(MaskTokenConfig(id=own), rows, spare, tokenizer)


def _by_id(wish: MaskTokenConfig, rows: int, spare: int, tokenizer) -> Choice:
    if not 0 <= wish.id < rows:
        raise UserError(
            Problem("id", f"{wish.id} is not one of the model's {rows} embedding rows; leave it out to add one")
        )
    if wish.id > spare:
        raise UserError(
            Problem("id", f"{wish.id} would leave a gap: the first row without a token is {spare}; use that")
        )
    if wish.id == spare:
        return Choice(spare, wish.token or NEW_TOKEN, "spare")
    name = tokenizer.convert_ids_to_tokens(wish.id)
    if wish.token not in (None, name):
        raise UserError(Problem("token", f"is {wish.token!r}, but id {wish.id} is {name!r}; give one of the two"))
    return Choice(wish.id, name, "existing")


def _existing(config, tokenizer, vocab: dict[str, int], rows: int) -> str | None:
    if tokenizer.mask_token is not None:
        return tokenizer.mask_token
    taken, template = set(special_ids(config, tokenizer)), str(tokenizer.chat_template or "")
    free = [t for t, i in vocab.items() if i < rows and i not in taken and t not in template]
    named = [t for t in MASK_NAMES if t in free]
    return next(iter([*named, *sorted((t for t in free if RESERVED.match(t)), key=vocab.__getitem__)]), None)


def special_ids(config, tokenizer) -> dict[int, str]:
    """id -> role of the tokens that already mean something."""
    taken: dict[int, str] = {}
    for role in ("bos", "eos", "pad"):
        for owner in (config, tokenizer):
            ids = getattr(owner, f"{role}_token_id", None) if owner is not None else None
            for token in ids if isinstance(ids, list | tuple) else [ids]:
                if token is not None:
                    taken.setdefault(token, role.upper())
    return taken


def _refuse_taken(token: int, config, tokenizer) -> None:
    if role := special_ids(config, tokenizer).get(token):
        what = f"token {token} is the model's {role} token, so masked and {role} positions would look alike"
        raise UserError(Problem("token", f"{what}; choose another"))


def _refuse_word(choice: Choice, tokenizer) -> None:
    """An ordinary piece of the vocabulary is in every text, and would lose its embedding."""
    special = choice.id in tokenizer.added_tokens_decoder or choice.id in tokenizer.all_special_ids
    if not (special or choice.token in MASK_NAMES or RESERVED.match(choice.token)):
        what = (
            f"{choice.token!r} (id {choice.id}) is an ordinary piece of text: its embedding would be lost, and masked "
            "positions would look like it"
        )
        raise UserError(Problem("token", f"{what}; name a special or reserved token, a new one, or leave it out"))


def _name(tokenizer, choice: Choice) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens({"mask_token": AddedToken(choice.token, special=True, normalized=False)})
    if tokenizer.mask_token_id != choice.id:
        raise UserError(
            Problem(
                "token",
                f"the tokenizer gives {choice.token!r} the id {tokenizer.mask_token_id}, not {choice.id}",
            )
        )


def _mean(weight, rows):
    return weight[: len(rows)].float()[rows.to(weight.device)].mean(0).to(weight.dtype)
