"""Datasets of a recipe -> token shards in the cache: read, cleaned, tokenised, written; or found there, finished.

Only one process may write a set of shards (a lock file sees to it); a second one finds it done. What an interrupted one
left is gone on with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt.components import SourceChoice
from adapt.config.schema import Data, Dataset, Recipe
from adapt.data.build import Options, build, check_bad_lines
from adapt.data.cache import cache_folder
from adapt.data.dedup import HELD_OUT
from adapt.data.documents import Source
from adapt.data.encode import Encoder
from adapt.data.held_out import HeldOut, of_shards, suite_sources, write_ngrams
from adapt.data.journal import NAME as JOURNAL
from adapt.data.shards import TokenShards
from adapt.errors import Problem, UserError

FORMAT = 3
"""Part of the cache key: raise it when what is written changes."""
log = logging.getLogger("adapt.data")


@dataclass(frozen=True)
class Prepared:
    train: list[TokenShards]
    """In the order of `data.train`."""
    eval: dict[str, TokenShards]
    """By label, in the order of `data.eval`."""

    @property
    def fingerprint(self) -> str:
        """Of every token, in order: another place or date of the same data does not matter."""
        sets = [[s.fingerprint for s in self.train], {k: s.fingerprint for k, s in self.eval.items()}]
        return hashlib.sha256(json.dumps(sets).encode()).hexdigest()

    @property
    def manifest(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "train": [s.manifest for s in self.train],
            "eval": {label: s.manifest for label, s in self.eval.items()},
        }


def prepare(recipe: Recipe, tokenizer: Any, *, train: bool = True, progress: bool = True) -> Prepared:
    """Raises UserError with what is wrong in every dataset that cannot be opened. `train=False`: only the held-out
    sets, for measuring; nothing else is opened."""
    data = recipe.data
    held_out, training = open_sources(data, train=train)
    for _, _, source in (*held_out, *training):
        if hasattr(source, "use_tokenizer"):  # its texts have a length in tokens
            source.use_tokenizer(tokenizer)
    encoder = Encoder(tokenizer)
    run = _Run(data, encoder, progress)
    evaluated = {}
    for where, dataset, source in held_out:
        evaluated[dataset.name or source.label] = run.shards(where, dataset, source, (), is_held_out=True)
    against: list[HeldOut] = []
    if training and (data.exact_dedup or data.near_dedup is not None or data.decontaminate is not None):
        against += [of_shards(label, shards) for label, shards in evaluated.items()]
    if training and data.decontaminate is not None:
        against += [run.ngrams(where, choice) for where, choice in suite_sources(recipe)]
    trained = [run.shards(where, dataset, source, tuple(against)) for where, dataset, source in training]
    prepared = Prepared(trained, evaluated)
    _refuse_other_forms(recipe, prepared)
    return prepared


def _refuse_other_forms(recipe: Recipe, prepared: Prepared) -> None:
    """Preference pairs are for objectives that tell the chosen from the rejected, and those read nothing else."""
    pairs = recipe.objective.declares("pairs")
    wrong = [f"data.train[{i}].source" for i, shards in enumerate(prepared.train) if shards.has_pairs != pairs]
    held_out = enumerate(prepared.eval.values())
    wrong += [f"data.eval[{i}].source" for i, shards in held_out if shards.has_pairs and not pairs]
    if wrong:
        raise UserError([pairs_problem(recipe, where) for where in wrong])


def pairs_problem(recipe: Recipe, where: str) -> Problem:
    name = recipe.objective.name
    if recipe.objective.declares("pairs"):
        return Problem(where, f"the objective {name} learns from preference pairs, and these records are none")
    return Problem(
        where,
        f"these are preference pairs, and the objective {name} would learn the rejected answers as well as the chosen "
        "ones; use an objective that compares them, or data with the chosen ones alone",
    )


Opened = list[tuple[str, Dataset, Source]]


def open_sources(data: Data, *, train: bool = True) -> tuple[Opened, Opened]:
    """(key in the recipe, dataset, source) of the held-out and the training data; all problems at once."""
    problems: list[Problem] = []
    opened: dict[str, Opened] = {"eval": [], "train": []}
    for section, datasets in (("eval", data.eval), ("train", data.train if train else ())):
        for i, dataset in enumerate(datasets):
            where = f"data.{section}[{i}].source"
            try:
                source = dataset.source.build()
                if hasattr(source, "use_cache"):
                    source.use_cache(cache_folder(data.cache))
                opened[section].append((where, dataset, source))
            except UserError as error:
                problems += [Problem(p.where or where, p.what) for p in error.problems]
    labels = [dataset.name or source.label for _, dataset, source in opened["eval"]]
    for label in sorted({x for x in labels if labels.count(x) > 1}):
        problems.append(Problem("data.eval", f"two entries are called {label!r}; give each a `name` of its own"))
    if not data.train:
        problems.append(Problem("data.train", "needs at least one entry"))
    if problems:
        raise UserError(problems)
    return opened["eval"], opened["train"]


class _Run:
    def __init__(self, data: Data, encoder: Encoder, progress: bool):
        self.data, self.encoder, self.progress = data, encoder, progress

    def shards(
        self, where: str, dataset: Dataset, source: Source, against: tuple[HeldOut, ...], is_held_out: bool = False
    ) -> TokenShards:
        """The finished shards of one dataset, from the cache or built now."""
        from adapt.config.decode import encode

        data, label = self.data, dataset.name or source.label
        options = Options(
            clean=(*getattr(source, "clean", ()), *dataset.clean),
            exact_dedup=data.exact_dedup,
            near_dedup=data.near_dedup,
            decontaminate=data.decontaminate if is_held_out or against else None,
            is_held_out=is_held_out,
            document_weight=dataset.document_weight,
            max_tokens=dataset.max_tokens,
            max_bad_lines=data.max_bad_lines,
            workers=data.workers,
        )
        with _named(where):
            facts = {
                "format": FORMAT,
                "source": encode(dataset.source),
                "source_fingerprint": source.fingerprint(),
                "tokenizer": self.encoder.fingerprint,
                "options": options.key(),
                "against": [h.fingerprint for h in against],
            }
            folder, key = self._place(label, facts)
            with _writing(folder) as temporary:
                if temporary is not None:
                    about = {"label": label, **facts, "config_fingerprint": key}
                    build(source, self.encoder, options, against, temporary, about, self.progress)
            shards = TokenShards(folder, label)
            check_bad_lines(shards.manifest, options.max_bad_lines)
        _tell(label, shards)
        return shards

    def ngrams(self, where: str, choice: SourceChoice) -> HeldOut:
        """Of what an evaluation suite asks, from the cache or read now."""
        n = self.data.decontaminate
        with _named(where):
            source = choice.build()
            if hasattr(source, "use_cache"):
                source.use_cache(cache_folder(self.data.cache))
            fingerprint = source.fingerprint()
            folder, _ = self._place(source.label, {"format": FORMAT, "ngrams": n, "source": fingerprint})
            with _writing(folder) as temporary:
                if temporary is not None:
                    write_ngrams(source, n, temporary / "ngrams.npy")
        return HeldOut(source.label, fingerprint, ngrams=folder / "ngrams.npy")

    def _place(self, label: str, facts: dict[str, Any]) -> tuple[Path, str]:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", label)[:60] or "data"
        return cache_folder(self.data.cache) / "data" / f"{slug}-{key[:16]}", key


@contextmanager
def _named(where: str):
    """Problems of a source are said with its key in the recipe."""
    try:
        yield
    except UserError as error:
        raise UserError([Problem(p.where or where, p.what) for p in error.problems]) from error


def _tell(label: str, shards: TokenShards) -> None:
    tokens, documents = shards.num_tokens, shards.num_documents
    log.info("%s: %s tokens in %s documents, %s", label, f"{tokens:,d}", f"{documents:,d}", shards.folder)
    for step in shards.manifest["steps"]:
        for reason, count in step["dropped"].items():
            if HELD_OUT in reason:
                log.warning(
                    "%s: %s of %s documents dropped: %s",
                    label,
                    f"{count:,d}",
                    f"{shards.manifest['steps'][0]['in']:,d}",
                    reason,
                )


@contextmanager
def _writing(folder: Path):
    """A temporary folder to write into, renamed to `folder` when all went well; None where that is finished."""
    from filelock import FileLock

    if folder.exists():
        yield None
        return
    temporary = folder.with_name(f"{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.exists():  # another process wrote it while we waited
                yield None
                return
            temporary.mkdir(exist_ok=True)  # what a killed process left is gone on with: we hold the lock
            try:
                yield temporary
                os.replace(temporary, folder)
            except UserError:  # the data is wrong: there is nothing to go on with
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            finally:
                if not (temporary / JOURNAL).exists():
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder.parent}: preparing data failed: {error.strerror or error}; "
            "`data.cache` or $ADAPT_CACHE chooses another folder"
        ) from error
