"""Packing: share of the rows' places that hold a token, share of the documents that are cut, and time to build.

    python benchmarks/packing.py                   # docstrings, and a million documents of log-normal length

Docstrings are those of the recipe `nbdiff` (its tokenizer, its cached shards). The synthetic lengths have a median of
500 tokens and a standard deviation of 1.2 in the logarithm, about what crawled pages have: a mean near 1000 and a long
tail. Every row of every packing is read to count the pieces of each document.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

LENGTHS = (512, 2048, 8192)


def docstrings() -> np.ndarray:
    """[documents] tokens of each."""
    from adapt.config import load
    from adapt.conversion.base import planned_tokenizer
    from adapt.data.prepare import prepare

    recipe = load("nbdiff").recipe
    (shards,) = prepare(recipe, planned_tokenizer(recipe), progress=False).train
    return np.diff(np.asarray(shards.document_offsets))


def log_normal(documents: int) -> np.ndarray:
    return np.random.default_rng(0).lognormal(np.log(500), 1.2, documents).astype(np.int64) + 1


def measure(kind: type, lengths: np.ndarray, seq_len: int) -> tuple[int, float, float, float]:
    """(rows, share of places with a token, share of documents cut, seconds to build)."""
    from adapt.data.permute import shuffled

    offsets, order = np.concatenate([[0], np.cumsum(lengths)]), shuffled(len(lengths), 0)
    started = time.perf_counter()
    packing = kind(order, offsets, seq_len)
    took = time.perf_counter() - started
    pieces = np.zeros(len(lengths), np.int64)
    for row in range(len(packing)):
        for document, _, _ in packing.segments(row):
            pieces[document] += 1
    return len(packing), lengths.sum() / (len(packing) * seq_len), float((pieces > 1).mean()), took


def main() -> None:
    from adapt.data.packing import PACKINGS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000, help="of the synthetic corpus")
    documents = parser.parse_args().documents
    corpora = {"docstrings": docstrings(), "log-normal": log_normal(documents)}
    print("| corpus | documents | mean tokens | T | longer than T | packing | rows | full | documents cut | built in |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, lengths in corpora.items():
        for seq_len in LENGTHS:
            for packing, kind in PACKINGS.items():
                rows, full, cut, took = measure(kind, lengths, seq_len)
                print(
                    f"| {name} | {len(lengths):,} | {lengths.mean():.0f} | {seq_len} "
                    f"| {100 * (lengths > seq_len).mean():.1f} % | {packing} | {rows:,} | {100 * full:.2f} % "
                    f"| {100 * cut:.1f} % | {took:.2f} s |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
