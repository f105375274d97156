"""Token shards: memory-mapped files of token ids, the offsets of documents in them, and a manifest.

manifest.json     what it is, where it comes from, size and sha256 of every other file; written last
tokens-*.bin      ids, uint16 or uint32, documents end to end; a document does not span files
roles-*.bin       int8 per token; only beside a file with context tokens
documents.npy     [documents + 1] int64, offset of each document over all files
bytes.npy         [documents] int64, UTF-8 bytes of the learned text of each
hashes.npy        [documents read] uint64, of the normalised texts
weights.npy       [documents] float32, how much each counts; only where documents have weights
signatures.npy    [documents read, 128] uint32, MinHash; with near-deduplication only
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.batch import CONTEXT, TARGET
from adapt.data.encode import Encoded
from adapt.errors import UserError

SHARD_TOKENS = 2**27


class ShardWriter:
    """Appends documents; memory stays bounded but for 16 bytes per document."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.offsets, self.bytes = array("q", [0]), array("q")
        self.num_targets = 0
        self.files: dict[str, dict[str, Any]] = {}
        self._shard = -1
        self._shard_size = shard_tokens
        self._tokens: _HashedFile | None = None
        self._roles: _HashedFile | None = None

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    def add(self, document: Encoded) -> None:
        size = len(document.tokens)
        if self._shard_size >= self.shard_tokens:
            self._next_shard()
        self._tokens.write(np.asarray(document.tokens, self.dtype).tobytes())
        roles = document.roles
        if roles is not None and CONTEXT in roles and self._roles is None:
            self._roles = _HashedFile(self.folder / f"roles-{self._shard:05d}.bin")
            self._roles.write(np.full(self._shard_size, TARGET, np.int8).tobytes())
        if self._roles is not None:
            self._roles.write(np.asarray(roles or [TARGET] * size, np.int8).tobytes())
        self.num_targets += size if roles is None else roles.count(TARGET)
        self._shard_size += size
        self.offsets.append(self.num_tokens + size)
        self.bytes.append(document.num_bytes)

    def finish(self, manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write offsets, further arrays and the manifest, which is returned."""
        self.close()
        own = {
            "documents": np.frombuffer(self.offsets, np.int64),
            "bytes": np.frombuffer(self.bytes, np.int64),
        }
        for name, values in {**own, **arrays}.items():
            file = self.folder / f"{name}.npy"
            np.save(file, values, allow_pickle=False)
            self.files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        manifest = {**manifest, "dtype": self.dtype.name, "files": dict(sorted(self.files.items()))}
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        return manifest

    def close(self) -> None:
        for file in (self._tokens, self._roles):
            if file is not None:
                self.files[file.path.name] = file.close()
        self._tokens = self._roles = None

    def _next_shard(self) -> None:
        self.close()
        self._shard += 1
        self._shard_size = 0
        self._tokens = _HashedFile(self.folder / f"tokens-{self._shard:05d}.bin")


class _HashedFile:
    def __init__(self, path: Path):
        self.path, self._file, self._digest, self._size = path, path.open("wb"), hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


class TokenShards:
    """A prepared dataset. Opening it checks the size of every file; `verify` checks their contents."""

    def __init__(self, folder: Path, label: str | None = None):
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        self.label = label or self.manifest["label"]
        for name, facts in self.manifest["files"].items():
            self._check_size(name, facts["bytes"])
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
        """Of the tokens themselves, wherever they came from."""
        files = self.manifest["files"]
        contents = {n: files[n]["sha256"] for n in files if n.startswith(("tokens", "roles", "documents"))}
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
        """[num_documents] float32, or None where documents have none."""
        return self._load("weights") if "weights.npy" in self.manifest["files"] else None

    def verify(self) -> None:
        """Read every file and compare it with the manifest."""
        for name, facts in self.manifest["files"].items():
            if sha256(self.folder / name) != facts["sha256"]:
                raise self._damaged(name, "its contents changed since it was written")

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
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(file.name, str(error)) from None

    def _check_size(self, name: str, expected: int) -> None:
        file = self.folder / name
        if not file.is_file():
            raise self._damaged(name, "it is missing")
        size = file.stat().st_size
        if size != expected:
            raise self._damaged(name, f"it has {size:,d} bytes instead of {expected:,d}")

    def _damaged(self, name: str, what: str) -> UserError:
        return UserError(
            f"{self.folder / name}: the prepared data is damaged: {what}. "
            f"Delete the folder {self.folder} and it will be prepared again"
        )


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
