"""The index of a checkpoint: which tensor is where in its files. torch writes it as a pickle, and a pickle is a program.

What it may call is named one by one, and what it makes is looked at before anything is read by it: torch unpickles
entries that say they are no tensors without any restriction, and opens whatever file an entry names.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from adapt.errors import UserError

DCP = "torch.distributed.checkpoint"
ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    (f"{DCP}.filesystem", "_StorageInfo"),
    *(
        (f"{DCP}.metadata", name)
        for name in (
            "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
}
"""No module, no function that finds others by name. Dtypes come in besides."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # Python 3.11.0 to 3.11.3 writes members of enumerations by it
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which has no place in a checkpoint")


def _member(of: Any, name: Any) -> Any:
    if of is not _MEM_FORMAT_ENCODING or name not in of.__members__:
        raise pickle.UnpicklingError(f"the index asks for {str(name)[:80]} of {str(of)[:80]}")
    return of[name]


class Reader(dcp.FileSystemReader):
    """torch's reader, of indices of tensors in the checkpoint's own files only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises UserError."""
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                index = _Unpickler(file).load()
            _check(index)
        except Exception as error:  # bytes that are no pickle raise nearly anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"checkpoint {self.path} cannot be read: {reason}\nDelete that folder to resume from the one before it."
            ) from None
        if getattr(index, "storage_meta", None) is None:
            index.storage_meta = dcp.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


def _check(index: Any) -> None:
    """Raises ValueError."""
    if type(index) is not Metadata:
        raise ValueError(f"its index is a {type(index).__name__}, not torch's")
    for name, entry in index.state_dict_metadata.items():
        if type(entry) is not TensorStorageMetadata:
            raise ValueError(f"its index says that {name!r} is no tensor")
        _check_sizes(name, entry.size)
        if type(entry.properties) is not TensorProperties or type(entry.properties.dtype) is not torch.dtype:
            raise ValueError(f"its index does not say what {name!r} consists of")
        for chunk in entry.chunks:
            if type(chunk) is not ChunkStorageMetadata:
                raise ValueError(f"its index has a {type(chunk).__name__} as a part of {name!r}")
            _check_sizes(name, chunk.offsets)
            _check_sizes(name, chunk.sizes)
    for place, found in index.storage_data.items():
        if type(place) is not MetadataIndex or type(found) is not _StorageInfo:
            raise ValueError(f"its index says that {place!r} is at {found!r}")
        file = found.relative_path
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise ValueError(f"its index says that {place.fqn!r} is in {file!r}, which is no file of its own")
        if not _counts([found.offset, found.length]) or found.transform_descriptors:
            raise ValueError(f"its index has no place for {place.fqn!r} that a file of ours has")


def _check_sizes(name: str, sizes: Any) -> None:
    if not isinstance(sizes, torch.Size) or not _counts(sizes):
        raise ValueError(f"its index says that {name!r} is of size {sizes!r}")


def _counts(numbers: Any) -> bool:
    return all(type(n) is int and n >= 0 for n in numbers) and math.prod(numbers) < 2**63
