"""Every problem of a recipe's base model that can be found before its weights are loaded, in one go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapt.config.schema import Model, Recipe, Tokenizer
from adapt.errors import NotReachable, Problem, UserError
from adapt.pretrained import gguf, load
from adapt.pretrained.arch import arch_config, arch_differences
from adapt.pretrained.bases import parse
from adapt.pretrained.families import family_problems, longest_row
from adapt.pretrained.rope import apply_rope


@dataclass
class BaseCheck:
    config: Any = None
    """The student's config (RoPE and conversions applied); null when it could not be had."""
    tokenizer: Any = None
    """The student's tokenizer (conversions applied); null when it could not be had."""
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """What stays open until the base can be reached."""


def check_base(recipe: Recipe, *, offline: bool = False) -> list[Problem]:
    """All problems of base, family, positions, tokenizer and conversions. Loads no weights."""
    return inspect_base(recipe, offline=offline).problems


def inspect_base(recipe: Recipe, *, offline: bool = False) -> BaseCheck:
    found = BaseCheck()
    found.config = _config(recipe, offline, found)
    found.problems += _base_problems(recipe)
    found.tokenizer = _tokenizer(recipe, offline, found)
    if found.config is not None:
        found.problems += family_problems(
            found.config, seq_len=recipe.data.seq_len, trusted=recipe.model.trust_remote_code
        )
        found.problems += _length_problems(recipe, found.config)
        found.problems += _dropout_problems(recipe, found.config)
    if found.config is None:
        return found
    from adapt.conversion.base import plan_conversions

    try:
        found.config, found.tokenizer = plan_conversions(recipe, found.config, found.tokenizer)
    except UserError as error:
        found.problems += error.problems
        return found
    if found.tokenizer is not None:  # after the conversions: they may add rows
        found.problems += fit_problems(found.tokenizer, found.config)
    return found


def fit_problems(tokenizer, config) -> list[Problem]:
    """A tokenizer must not produce ids the embedding has no row for."""
    size, rows = len(tokenizer), config.vocab_size
    highest = max(tokenizer.get_vocab().values(), default=-1) + 1
    if max(size, highest) > rows:
        return [
            Problem(
                "tokenizer.path",
                f"the tokenizer has {max(size, highest)} tokens, but the model only {rows} embedding rows; use the "
                "base's own tokenizer, or extend the vocabulary with a conversion",
            )
        ]
    problems = mask_problems(tokenizer, config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name, None)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and token >= rows:
                problems.append(
                    Problem("model.base", f"its config has {name}={token}, beyond its {rows} embedding rows")
                )
    return problems


def mask_problems(tokenizer, config) -> list[Problem]:
    """The model's mask token must be the tokenizer's, where both have one."""
    ours, theirs = getattr(config, "mask_token_id", None), tokenizer.mask_token_id
    if ours is None or theirs is None or ours == theirs:
        return []
    return [
        Problem(
            "model.base",
            f"its config has mask_token_id={ours} ({tokenizer.convert_ids_to_tokens(ours)!r} to its tokenizer), but the "
            f"tokenizer's mask token {tokenizer.mask_token!r} is {theirs}; with the wrong one no slot is ever seen as "
            "masked. Correct config.json or tokenizer_config.json, or in a recipe say which: "
            f"model.conversions=[{{name: mask_token, id: {ours}}}]",
        )
    ]


def _config(recipe: Recipe, offline: bool, found: BaseCheck):
    model = recipe.model
    try:
        config = load.real_config(model, offline=offline)
    except NotReachable as error:
        if offline:
            found.unchecked.append(f"model.base: {model.base} (family, positions, vocabulary): not reachable offline")
        else:
            found.problems += error.problems
        return None
    except UserError as error:
        found.problems += error.problems
        return None
    try:
        if config is None:
            config = _stated(model)
            found.unchecked.append(f"model.base: {model.base} is out of reach; its shape is taken from model.arch")
        elif model.arch:
            found.problems += arch_differences(model.arch, config)
        apply_rope(config, model.rope_scaling)
    except UserError as error:
        found.problems += error.problems
        return None
    return config


def _stated(model: Model):
    try:
        return arch_config(model.arch)
    except UserError as error:
        what = f"{model.base} is out of reach, so its shape is model.arch, and all of it must be right: give it, or a local folder as base"
        raise UserError([Problem("model.base", what), *error.problems]) from None


def _tokenizer(recipe: Recipe, offline: bool, found: BaseCheck):
    try:
        if recipe.tokenizer == Tokenizer():
            base = parse(recipe.model.base)
            if base.kind in ("gguf", "pypi") and not gguf.cached_folder(base).is_dir():
                found.unchecked.append(f"tokenizer: {base.text} is read when the run first needs it")
                return None
        built = recipe.tokenizer.recipe is not None  # by the run, not by looking at it
        return load.load_tokenizer(recipe, offline=offline or built)
    except NotReachable as error:
        if recipe.tokenizer.recipe is not None:
            found.unchecked += [str(p) for p in error.problems]
        elif offline or recipe.model.arch:
            found.unchecked.append("tokenizer: not reachable from here")
        elif recipe.tokenizer.path:  # else the base already said so
            found.problems += [Problem("tokenizer.path", p.what) for p in error.problems]
    except UserError as error:
        known = {str(p) for p in found.problems}
        found.problems += [p for p in error.problems if str(p) not in known]
    return None


def _base_problems(recipe: Recipe) -> list[Problem]:
    """What the kind of base rules out, and a folder without weights."""
    model = recipe.model
    try:
        base = parse(model.base)
    except UserError:  # said already
        return []
    problems = []
    if model.revision is not None and base.kind != "hub":
        what = f"{model.revision!r} is a revision on the Hub, and {model.base} is not from there; leave it out"
        problems.append(Problem("model.revision", what))
    if base.kind == "folder" and (Path(base.text) / "config.json").is_file():
        problems += load.weights_problems(model, Path(base.text))
    return problems


def _length_problems(recipe: Recipe, config) -> list[Problem]:
    longest = longest_row(config)
    if longest is None or recipe.data.seq_len <= longest:
        return []
    factor = -(-recipe.data.seq_len // longest)
    return [
        Problem(
            "data.seq_len",
            f"{recipe.data.seq_len} is more than the {longest} positions of {recipe.model.base}; use at most "
            f"{longest}, or stretch them: model.rope_scaling={{rope_type: yarn, factor: {factor}}}",
        )
    ]


def _dropout_problems(recipe: Recipe, config) -> list[Problem]:
    dropout = getattr(config, "attention_dropout", 0.0)
    if not dropout or recipe.model.attention != "flex":
        return []
    return [
        Problem(
            "model.attention",
            f"flex has no dropout, and {recipe.model.base} asks for attention_dropout={dropout}; use tiled, or set it "
            "to 0 in the base's config.json",
        )
    ]
