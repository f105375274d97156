"""A checkpoint in the layout of another number of ranks, made by one process that holds one tensor at a time.

Every checkpoint can be loaded on any number of ranks. But where they were fewer when it was saved, each of many would read
whole tensors to find its rows in them; here each gets a file of its own, with the rows that FSDP2 gives it (dim 0 in equal
chunks, the last ones smaller or empty).
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from adapt.distributed.checkpoint import Reader
from adapt.distributed.checksums import put, put_sums, sync_folder
from adapt.errors import Problem, UserError

UNREADABLE = (RuntimeError, ValueError, KeyError, TypeError, AssertionError, EOFError)
"""What torch raises for files that do not hold what the index says."""


def reshard(source: Path, folder: Path, ranks: int) -> Path:
    """Write the (healthy) checkpoint `source` as `folder/<its name>` for `ranks` ranks, optimizer state and all. Raises
    UserError where something is there already, or it cannot be written; nothing is left behind then."""
    final = folder / source.name
    partial = folder / f".partial-{final.name}"
    if final.exists():
        raise UserError(Problem("--to", f"{final} is there already; give another folder, or move it away"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        sums = _write(source, partial, ranks)
        for file in source.glob("*.json"):
            sums[file.name] = put(partial / file.name, file.read_text())
        put_sums(partial, sums)
        sync_folder(partial)
        os.replace(partial, final)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(Problem("--to", f"{final} cannot be written: {error.strerror}; nothing was left")) from None
    except (*UNREADABLE, pickle.PickleError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"checkpoint {source} cannot be read: {error}; nothing was left in {folder}") from None
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _write(source: Path, folder: Path, ranks: int) -> dict[str, str]:
    """Tensors and index. Returns file -> SHA-256."""
    reader = Reader(str(source))
    saved = reader.read_metadata()
    reader.set_up_storage_reader(saved, is_coordinator=True)
    digests: dict[str, Any] = {}
    index = Metadata({}, saved.planner_data, {}, saved.storage_meta, saved.version)
    for name, entry in saved.state_dict_metadata.items():
        tensor = _read(reader, name, entry)
        chunks = _chunks(tensor.shape, ranks)
        index.state_dict_metadata[name] = TensorStorageMetadata(entry.properties, entry.size, list(chunks.values()))
        for rank, chunk in chunks.items():
            stream = io.BytesIO()
            torch.save(narrow_tensor_by_index(tensor, chunk.offsets, chunk.sizes).clone(), stream)
            file, data = f"__{rank}_0.distcp", stream.getbuffer()
            with open(folder / file, "ab") as out:  # ranks may well be more than files that can be open
                place = _StorageInfo(file, out.tell(), len(data))
                out.write(data)
            digests.setdefault(file, hashlib.sha256()).update(data)
            index.storage_data[MetadataIndex(name, chunk.offsets)] = place
    digests[".metadata"] = hashlib.sha256(pickle.dumps(index))
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    for file in digests:
        with open(folder / file, "rb") as written:
            os.fsync(written.fileno())
    return {file: digest.hexdigest() for file, digest in digests.items()}


def _chunks(shape: torch.Size, ranks: int) -> dict[int, ChunkStorageMetadata]:
    """Rank -> its rows, of those that have any. A number is rank 0's."""
    if not shape:
        return {0: ChunkStorageMetadata(shape, shape)}
    size = max(1, -(-shape[0] // ranks))
    starts = range(0, max(1, shape[0]), size)
    rest = shape[1:]
    return {
        rank: ChunkStorageMetadata(
            torch.Size([start, *(0 for _ in rest)]), torch.Size([min(size, shape[0] - start), *rest])
        )
        for rank, start in enumerate(starts)
    }


def _read(reader: Reader, name: str, entry: TensorStorageMetadata) -> Tensor:
    """One tensor, whole."""
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    everything = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)
    reader.read_data(LoadPlan(create_read_items_for_chunk_list(name, entry, [everything])), _Into(tensor)).wait()
    return tensor


class _Into:
    """What DCP's reader asks a planner: where the rows go that it has read."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self.tensor, item.dest_offsets, item.lengths)

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """It was copied in place."""
