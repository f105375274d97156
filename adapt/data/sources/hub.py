"""Hub data sets, streamed: nothing is downloaded beyond what `max_tokens` of the dataset entry asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapt.components import sources
from adapt.data.cache import cache_folder
from adapt.data.documents import BadRecord, Document
from adapt.data.records import Fields, to_document
from adapt.errors import NotReachable, UserError


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    id: str
    """Data set on the Hub, `org/name`."""
    split: str = "train"
    """Split to read."""
    config: str | None = None
    """Configuration (subset) of the data set; null: its default."""
    revision: str | None = None
    """Branch, tag or commit; null: the main branch. The commit is looked up and becomes part of the fingerprint."""
    fields: Fields = field(default_factory=Fields)
    """Names of the columns, where they are not the usual ones."""
    licence: str | None = None
    """Printed in the manifest and the model card; null takes the data set card's."""


class HubSource:
    remote = True

    def __init__(self, config: HubConfig):
        self.config = config
        self.where = f"data set {config.id}"
        self.label = config.id.rpartition("/")[2]
        self._facts: dict[str, Any] | None = None
        self._cache = cache_folder(None)

    def use_cache(self, folder: Path) -> None:
        self._cache = folder

    @property
    def licence(self) -> str | None:
        return self.config.licence or self._resolve().get("licence")

    def fingerprint(self) -> str:
        c = self.config
        return hashlib.sha256(repr((c.id, self._resolve()["sha"], c.split, c.config, c.fields)).encode()).hexdigest()

    def documents(self) -> Iterator[Document | BadRecord]:
        from datasets import load_dataset

        c = self.config
        number = 0
        try:
            rows = load_dataset(c.id, c.config, split=c.split, revision=self._resolve()["sha"], streaming=True)
            for row in rows:
                present = {k: v for k, v in row.items() if v is not None}
                yield to_document(present, c.fields, f"{c.id}/{c.split}:{number}", c.config or c.split)
                number += 1
        except UserError:
            raise
        except Exception as error:  # datasets, fsspec and HTTP errors share no base class
            at = f", after row {number}" if number else ""
            raise UserError(f"{self.where}{at}: {_first_line(error)}") from error

    def _resolve(self) -> dict[str, Any]:
        """Commit and licence. Remembered in the cache, so that machines without network can use prepared shards."""
        if self._facts is None:
            c = self.config
            memory = self._cache / "hub" / f"{c.id.replace('/', '--')}@{(c.revision or 'main').replace('/', '--')}.json"
            try:
                self._facts = self._look_up()
            except Exception as error:
                if _is_missing(error):
                    raise UserError(f"{self.where}: {_first_line(error)}") from error
                if not memory.is_file():
                    raise NotReachable(f"{self.where}: {_first_line(error)}") from error
                self._facts = json.loads(memory.read_text())
            else:
                self._remember(memory, self._facts)
        return self._facts

    @staticmethod
    def _remember(memory: Path, facts: dict[str, Any]) -> None:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            memory.write_text(json.dumps(facts))
        except OSError as error:
            raise UserError(
                f"{memory}: cannot be written: {error.strerror}; `data.cache` or $ADAPT_CACHE chooses another folder"
            ) from None

    def _look_up(self) -> dict[str, Any]:
        from huggingface_hub import HfApi

        info = HfApi().dataset_info(self.config.id, revision=self.config.revision, timeout=10)
        card = info.card_data
        licence = card.get("license") if card else None
        return {"sha": info.sha, "licence": ", ".join(licence) if isinstance(licence, list) else licence}


def _is_missing(error: Exception) -> bool:
    """Whether the Hub answered that there is no such thing, rather than not at all."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@sources.register("hub")
def hub(config: HubConfig) -> HubSource:
    return HubSource(config)
