"""Cleaning steps as datatrove pipelines: a task reads its share of a source, cleans it and writes a file.

Steps that remember (exact line or document deduplication) need all documents in one order, so they are left out here and
named; `adapt data prepare` runs them, and its own deduplication, on what this leaves. The n-th of N tasks reads every
N-th file of a source of files, if there are enough of them, else every N-th document.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document as TroveDocument
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from adapt.components import CleanerChoice, SourceChoice
from adapt.config.decode import encode
from adapt.config.schema import Dataset
from adapt.data.cleaning.base import FORMS
from adapt.data.counts import Tally, size_of
from adapt.data.documents import BadRecord, Document, Source
from adapt.data.work import apply
from adapt.errors import UserError


@dataclass(frozen=True)
class Task:
    """What is to be done to one dataset."""

    label: str
    source: SourceChoice
    fingerprint: str
    steps: tuple[CleanerChoice, ...]
    left_out: tuple[str, ...]
    """Names of the steps that remember."""
    max_bad_lines: float

    @classmethod
    def of(cls, label: str, dataset: Dataset, source: Source, max_bad_lines: float) -> Task:
        chosen = (*getattr(source, "clean", ()), *dataset.clean)
        alone = [not getattr(choice.build(), "sequential", False) for choice in chosen]
        steps = tuple(itertools.compress(chosen, alone))
        left_out = tuple(c.name for c, is_alone in zip(chosen, alone, strict=True) if not is_alone)
        return cls(label, dataset.source, source.fingerprint(), steps, left_out, max_bad_lines)

    def facts(self) -> dict[str, Any]:
        return {"source": encode(self.source), "fingerprint": self.fingerprint, "steps": encode(self.steps)}


def executor(task: Task, args: argparse.Namespace) -> PipelineExecutor:
    """Not yet run. Its logs, per-step statistics and batch script go to `<to>/logs/<label>`."""
    pipeline = [
        Read(task.source, task.max_bad_lines),
        *(Clean(choice) for choice in task.steps),
        Write(args.to / task.label),
    ]
    logs = str(args.to / "logs" / task.label)
    if args.executor == "local":
        return LocalPipelineExecutor(pipeline, tasks=args.tasks, workers=args.workers, logging_dir=logs)
    activate = Path(sys.prefix) / "bin" / "activate"
    return SlurmPipelineExecutor(
        pipeline,
        tasks=args.tasks,
        workers=args.workers,
        time=args.time,
        partition=args.partition,
        cpus_per_task=args.cpus_per_task,
        mem_per_cpu_gb=args.mem_per_cpu,
        qos=args.qos,
        venv_path=args.venv or (str(activate) if activate.is_file() else None),
        job_name=f"clean-{task.label}",
        depends_job_id=args.depends,
        run_on_dependency_fail=args.run_on_dependency_fail,
        sbatch_args=dict(item.split("=", 1) for item in args.sbatch),
        logging_dir=logs,
    )


class Read(PipelineStep):
    """Yields datatrove's documents; ours goes along as `metadata["document"]`."""

    name = "source"
    type = "read"

    def __init__(self, source: SourceChoice, max_bad_lines: float):
        super().__init__()
        self.source, self.max_bad_lines = source, max_bad_lines

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        source = self.source.build()
        yield from data or ()
        read = bad = 0
        for item in share(source, rank, world_size):
            read += 1
            if isinstance(item, BadRecord):
                bad += 1
                self.stat_update("malformed")
            elif size_of(item)[1] == 0:
                self.stat_update("empty")
            else:
                self.stat_update("documents")
                yield wrapped(item)
        if bad > self.max_bad_lines * read:
            raise UserError(
                f"{source.where}: {bad:,d} of {read:,d} records of this task are malformed, more than the tolerated "
                f"fraction data.max_bad_lines={self.max_bad_lines:g}; `adapt data prepare` lists them"
            )


class Clean(PipelineStep):
    """One cleaning step of ours."""

    type = "clean"

    def __init__(self, choice: CleanerChoice):
        self.name = choice.name
        super().__init__()
        self.choice = choice

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        step = self.choice.build()
        for document in data:
            with self.track_time():
                tally = Tally(self.name)
                own = document.metadata["document"]
                result = apply(step, own, size_of(own), tally)
                for label, count in (
                    ("in", 1),
                    ("changed", tally.changed),
                    *((f"dropped: {r}", n) for r, n in tally.dropped.items()),
                ):
                    if count:
                        self.stat_update(label, value=count)
                self.stat_update("bytes in", value=tally.bytes_in)
                self.stat_update("bytes out", value=tally.bytes_out)
            if result is not None:
                yield document if result[0] is own else wrapped(result[0])


class Write(PipelineStep):
    """JSON lines as `jsonl:` reads them, a file per task; a task that was interrupted leaves none."""

    name = "jsonl"
    type = "write"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{rank:05d}.jsonl.gz"
        temporary = file.with_suffix(".part")
        with temporary.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as stream:
            for document in data:
                line = json.dumps(record(document.metadata["document"]), ensure_ascii=False)
                stream.write(line.encode() + b"\n")
                self.stat_update("documents")
                yield document
        os.replace(temporary, file)


def wrapped(document: Document) -> TroveDocument:
    return TroveDocument("\n".join(document.strings()), document.id, metadata={"document": document})


def record(document: Document) -> dict[str, Any]:
    """The JSON object of a document: its form, and the facts about it."""
    form = {name: value for name in FORMS if (value := getattr(document, name)) is not None}
    return {"id": document.id, **document.meta, **form}


def share(source: Source, rank: int, world: int) -> Iterator[Document | BadRecord]:
    """The documents of one of `world` tasks; together they are all, each once."""
    parts = getattr(source, "parts", [source])
    if all(hasattr(part, "files") for part in parts):
        files = [file for part in parts for file in part.files]
        if len(files) >= world:
            mine = set(files[rank::world])
            for part in parts:
                own = copy.copy(part)
                own.files = [file for file in part.files if file in mine]
                yield from own.documents()
            return
    yield from itertools.islice(source.documents(), rank, None, world)
