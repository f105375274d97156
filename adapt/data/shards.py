"""Token shards: memory-mapped files of token ids, the offsets of documents in them, and a manifest.

manifest.json     what it is, where it comes from, size and sha256 of every other file; written last
tokens-*.bin      ids, uint16 or uint32, documents end to end; a document does not span files
roles-*.bin       int8 per token; only beside a file with context tokens
documents.npy     [documents + 1] int64, offset of each document over all files
bytes.npy         [documents] int64, UTF-8 bytes of the learned text of each
weights.npy       [documents] float32; with a `document_weight` only
hashes.npy        [records kept] uint64, of the normalised texts
signatures.npy    [records kept, 128] uint32, MinHash; with near-deduplication only
ngrams.npy        uint64, sorted hashes of the n-grams of a held-out set; with decontamination only
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.encode import Encoded
from adapt.data.growing import Damaged, GrowingFile, sha256
from adapt.data.roles import CONTEXT, TARGET
from adapt.errors import UserError

SHARD_TOKENS = 2**27
SUM = "sha256"
"""Key of the manifest that says what all the others should hold; shards of earlier versions have none."""
SMALL = 2**24
"""Bytes up to which a file is read and compared with the manifest whenever the shards are opened."""


class ShardWriter:
    """Appends documents to files; memory stays bounded. `commit` makes what was written so far durable, and its answer
    is what a later writer goes on from."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int | None = None, state: dict | None = None):
        """Raises Damaged if the files are not what `state` says."""
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens or SHARD_TOKENS
        self.num_tokens = self.num_targets = self.num_bytes = 0
        self.files: dict[str, dict[str, Any]] = {}
        self._shard = -1
        self._shard_size = self.shard_tokens
        self._tokens: GrowingFile | None = None
        self._roles: GrowingFile | None = None
        self._columns: dict[str, GrowingFile] = {}
        if state is None:
            self.append("documents", np.zeros(1, np.int64))
        else:
            self._restore(state)

    def add(self, document: Encoded) -> None:
        size = len(document.tokens)
        if self._shard_size >= self.shard_tokens:
            self._next_shard()
        self._tokens.write(np.asarray(document.tokens, self.dtype).tobytes())
        roles = None if document.roles is None else np.asarray(document.roles, np.int8)
        if roles is not None and self._roles is None and (roles == CONTEXT).any():
            self._roles = GrowingFile(self.folder / f"roles-{self._shard:05d}.bin")
            self._roles.write(np.full(self._shard_size, TARGET, np.int8).tobytes())
        if self._roles is not None:
            self._roles.write((np.full(size, TARGET, np.int8) if roles is None else roles).tobytes())
        self.num_targets += size if roles is None else int((roles == TARGET).sum())
        self.num_tokens += size
        self.num_bytes += document.num_bytes
        self._shard_size += size
        self.append("documents", np.array([self.num_tokens], np.int64))
        self.append("bytes", np.array([document.num_bytes], np.int64))

    def append(self, name: str, values: np.ndarray) -> None:
        """Further entries of the column `name.npy`."""
        column = self._columns.get(name)
        if column is None:
            shape = list(values.shape[1:])
            column = GrowingFile(self.folder / f"{name}.column", dtype=values.dtype.name, shape=shape)
            self._columns[name] = column
        column.write(np.ascontiguousarray(values).tobytes())

    def column(self, name: str) -> np.ndarray | None:
        """What is in a column so far, memory-mapped."""
        return self._columns[name].array() if name in self._columns else None

    def forget(self, name: str) -> None:
        """Leave a column out of what is finished."""
        if name in self._columns:
            column = self._columns.pop(name)
            column.close()
            column.path.unlink()

    def commit(self) -> dict[str, Any]:
        growing = [f for f in (self._tokens, self._roles, *self._columns.values()) if f is not None]
        return {
            "tokens": self.num_tokens,
            "targets": self.num_targets,
            "bytes": self.num_bytes,
            "shard": self._shard,
            "shard_size": self._shard_size,
            "files": self.files,
            "growing": [file.commit() for file in growing],
        }

    def finish(self, manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write the columns, further arrays (instead of a column of the same name) and the manifest, which is
        returned."""
        self.close()
        columns = {name: arrays[name] if name in arrays else self.column(name) for name in self._columns}
        for name, values in {**columns, **arrays}.items():
            file = self.folder / f"{name}.npy"
            np.save(file, values, allow_pickle=False)
            self.files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for column in self._columns.values():
            column.path.unlink()
        manifest = {**manifest, "dtype": self.dtype.name, "files": dict(sorted(self.files.items()))}
        whole = {**manifest, SUM: _sum_of(manifest)}
        (self.folder / "manifest.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        return manifest

    def close(self) -> None:
        self._close_shard()
        for column in self._columns.values():
            column.close()

    def _close_shard(self) -> None:
        for file in (self._tokens, self._roles):
            if file is not None:
                self.files[file.path.name] = file.close()
        self._tokens = self._roles = None

    def _next_shard(self) -> None:
        self._close_shard()
        self._shard += 1
        self._shard_size = 0
        self._tokens = GrowingFile(self.folder / f"tokens-{self._shard:05d}.bin")

    def _restore(self, state: dict[str, Any]) -> None:
        self.num_tokens, self.num_targets, self.num_bytes = state["tokens"], state["targets"], state["bytes"]
        self._shard, self._shard_size, self.files = state["shard"], state["shard_size"], state["files"]
        for name, facts in self.files.items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != facts["bytes"]:
                raise Damaged(f"{file} is not as it was")
        growing = {facts["name"]: GrowingFile.reopen(self.folder, facts) for facts in state["growing"]}
        self._tokens = growing.get(f"tokens-{self._shard:05d}.bin")
        self._roles = growing.get(f"roles-{self._shard:05d}.bin")
        self._columns = {file.path.stem: file for file in growing.values() if file.path.suffix == ".column"}
        for file in self.folder.iterdir():
            if file.name not in self.files and file.name not in growing and file.suffix in (".bin", ".column", ".npy"):
                file.unlink()  # begun after the commit


class TokenShards:
    """A prepared dataset. Opening it checks the size of every file and the contents of small ones; `verify` checks the
    contents of all."""

    def __init__(self, folder: Path, label: str | None = None):
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        self.label = label or self.manifest["label"]
        for name, facts in self.manifest["files"].items():
            self._check_size(name, facts["bytes"])
            if facts["bytes"] <= SMALL:
                self._check_contents(name, facts["sha256"])
        self.document_offsets = self._load("documents")
        """[num_documents + 1] int64"""
        self.document_bytes = self._load("bytes")
        """[num_documents] int64"""
        dtype = np.dtype(self.manifest["dtype"])
        names = sorted(n for n in self.manifest["files"] if n.startswith("tokens-"))
        self._tokens = [np.memmap(self.folder / n, dtype, "r") for n in names]
        roles = [n.replace("tokens", "roles") for n in names]
        self._roles = [np.memmap(self.folder / n, np.int8, "r") if n in self.manifest["files"] else None for n in roles]
        self._starts = np.cumsum([0, *(len(t) for t in self._tokens)]).tolist()

    num_tokens = property(lambda self: self._starts[-1])
    num_documents = property(lambda self: len(self.document_bytes))
    has_pairs = property(lambda self: bool(self.manifest["pairs"]))
    """Documents 2p and 2p + 1 are the chosen and the rejected sequence of pair p."""
    has_roles = property(lambda self: any(r is not None for r in self._roles))
    pad_id = property(lambda self: int(self.manifest["pad_id"]))

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens themselves (and the weights of documents), wherever they came from."""
        files = self.manifest["files"]
        telling = ("tokens", "roles", "documents", "weights")
        contents = {n: files[n]["sha256"] for n in files if n.startswith(telling)}
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids [stop - start] from offset `start`, counted over all documents."""
        return self._read(self._tokens, start, stop, 0)

    def roles(self, start: int, stop: int) -> np.ndarray:
        """CONTEXT or TARGET [stop - start] int8."""
        return self._read(self._roles, start, stop, TARGET)

    def hashes(self) -> np.ndarray:
        return self._load("hashes")

    def signatures(self) -> np.ndarray | None:
        return self._load("signatures") if "signatures.npy" in self.manifest["files"] else None

    def document_weights(self) -> np.ndarray | None:
        """[num_documents] float32; None where the dataset has no `document_weight`."""
        return self._load("weights") if "weights.npy" in self.manifest["files"] else None

    def ngrams(self) -> Path | None:
        """File of the sorted hashes [N] uint64 of a held-out set's n-grams."""
        return self.folder / "ngrams.npy" if "ngrams.npy" in self.manifest["files"] else None

    def verify(self) -> None:
        """Read every file and compare it with the manifest."""
        for name, facts in self.manifest["files"].items():
            self._check_contents(name, facts["sha256"])

    def _read(self, files: list, start: int, stop: int, default: int) -> np.ndarray:
        index = bisect_right(self._starts, start) - 1
        pieces = []
        while start < stop:
            first, end = self._starts[index], min(stop, self._starts[index + 1])
            file = files[index]
            pieces.append(np.full(end - start, default, np.int8) if file is None else file[start - first : end - first])
            start, index = end, index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.int64)])

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def _read_manifest(self) -> dict[str, Any]:
        file = self.folder / "manifest.json"
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(file.name, str(error)) from None
        if not isinstance(found, dict) or found.pop(SUM, None) not in (None, _sum_of(found)):
            raise self._damaged(file.name, "its contents changed since it was written")
        if missing := [key for key in ("label", "dtype", "files", "pad_id", "pairs") if key not in found]:
            raise self._damaged(file.name, f"it says nothing of {', '.join(missing)}")
        return found

    def _check_size(self, name: str, expected: int) -> None:
        file = self.folder / name
        if not file.is_file():
            raise self._damaged(name, "it is missing")
        size = file.stat().st_size
        if size != expected:
            raise self._damaged(name, f"it has {size:,d} bytes instead of {expected:,d}")

    def _check_contents(self, name: str, expected: str) -> None:
        if sha256(self.folder / name) != expected:
            raise self._damaged(name, "its contents changed since it was written")

    def _damaged(self, name: str, what: str) -> UserError:
        return UserError(
            f"{self.folder / name}: the prepared data is damaged: {what}. "
            f"Delete the folder {self.folder} and it will be prepared again"
        )


def _sum_of(manifest: dict[str, Any]) -> str:
    read = json.loads(json.dumps(manifest))  # keys that are no strings become some
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()
