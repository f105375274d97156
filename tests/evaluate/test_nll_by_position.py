"""Likelihood by position: rows longer than those of the training, against one document and one token at a time."""

from __future__ import annotations

import re

import pytest
import torch

from adapt.data.batch import PAD
from adapt.data.stream import eval_batches
from adapt.errors import UserError
from adapt.evaluate.suites.nll_by_position import NllByPositionConfig
from adapt.generation.contract import Contract
from adapt.report.data import COLOURS, read
from adapt.report.sections.positions import curves
from tests import tiny
from tests.data.helpers import make_shards, unique_documents
from tests.evaluate.test_suites import context, suite

LENGTH, PARTS, ROWS = 96, 4, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), made([50, 7, 31, 120, 80]))


def made(lengths):
    """Documents of the tiny vocabulary's ids."""
    return [[token % 300 + 10 for token in document] for document in unique_documents(lengths)]


def sets(shards, rank=0, world=1):
    def rows(**how):
        return eval_batches(shards, 24, 2, ROWS, rank, world, **how)

    return {"text": rows}


@pytest.mark.parametrize("documents", ["joined", "apart"])
def test_each_token_counts_where_it_stands(documents, shards):
    grids, joined = [], documents == "joined"
    measure = suite("nll_by_position", length=LENGTH, parts=PARTS, documents=documents)
    results = measure(context(None, eval_sets=sets(shards), keep=grids.append))
    model, by_part = tiny.tiny_model("qwen3", dtype=torch.float64), [[] for _ in range(PARTS)]
    for batch in eval_batches(shards, 24, 2, ROWS, row_tokens=LENGTH, joined=joined):
        for row in range(batch.num_rows):
            real = batch.role[row] != PAD
            docs = torch.zeros_like(batch.doc_ids[row]) if joined else batch.doc_ids[row]
            for doc in docs[real].unique():
                ids = batch.input_ids[row, real & (docs == doc)].tolist()
                with torch.no_grad():
                    logp = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
                for i in range(1, len(ids)):
                    by_part[i * PARTS // LENGTH].append(-float(logp[i - 1, ids[i]]))
    (grid,) = grids
    assert grid.columns == ("0-24", "24-48", "48-72", "72-96")
    assert grid.cells[0] == pytest.approx([sum(part) / len(part) for part in by_part], rel=1e-9)
    assert results == {f"nll_by_position/text/{n}": grid.cells[0][i] for i, n in ((0, "0-24"), (3, "72-96"))}
    assert list(results) == measure.config.metrics(None, ["text"])
    assert min(map(len, by_part)) == grid.trials > 0


def test_rows_of_another_length_read_the_same_tokens(shards):
    """Joined, every token but the first of a row is predicted, those at the seams of documents included."""
    (one, *others) = eval_batches(shards, 24, 2, None, row_tokens=LENGTH, joined=True)
    assert one.input_ids.shape == (2, LENGTH)
    assert all(torch.equal(b.doc_ids == 0, b.role != PAD) for b in (one, *others))
    assert int((one.labels == -100).sum()) == 2
    tokens = {w: torch.cat([b.input_ids[b.role != PAD] for b in eval_batches(shards, 24, 2, None, row_tokens=w)])
              for w in (None, LENGTH)}  # fmt: skip
    assert torch.equal(tokens[None], tokens[LENGTH])


def test_ranks_add_up(shards):
    measure = suite("nll_by_position", length=LENGTH, parts=PARTS)
    whole, seen = measure(context(None, eval_sets=sets(shards))), []
    measure(context(None, eval_sets=sets(shards, 0, 2), reduce=lambda sums: seen.append(sums) or sums))

    def add(sums):
        return {k: v + seen[0][k] for k, v in sums.items()}

    assert measure(context(None, eval_sets=sets(shards, 1, 2), reduce=add)) == pytest.approx(whole, rel=1e-12)


def test_a_part_without_tokens_has_no_value(tmp_path):
    short = make_shards(tmp_path, made([20, 9]))
    grids = []
    results = suite("nll_by_position", length=LENGTH, parts=PARTS)(
        context(None, eval_sets=sets(short), keep=grids.append)
    )
    assert grids[0].cells[0][2:] == (None, None)
    assert results["nll_by_position/text/72-96"] != results["nll_by_position/text/72-96"]  # NaN


def test_what_cannot_be_measured_is_refused(shards):
    with pytest.raises(UserError, match="context of 512"):
        suite("nll_by_position")(context(None, eval_sets=sets(shards)))
    with pytest.raises(UserError, match="context_mask: block"):
        suite("nll_by_position")(context(None, contract=Contract(block_size=4, context_mask="block")))
    with pytest.raises(ValueError, match="parts=9 must be from 1 to the 8 tokens"):
        NllByPositionConfig(length=8, parts=9)


def test_the_report_draws_other_models_the_start_and_the_end(tmp_path):
    from adapt.report import build
    from tests.report.test_page import Checked, make_run

    run = make_run(tmp_path, "one")
    with open(run / "grids.jsonl", "a") as file:
        import json

        shape = {"suite": "nll_by_position", "unit": "nats per token", "trials": 5}
        shape |= {"rows": ["text"], "columns": ["0-24", "24-48"]}
        for step, model, cells in (
            (0, "", [3.0, 4.0]),
            (0, "teacher", [1.0, 0.5]),
            (9, "", [2.0, None]),
            (20, "", [1.5, 1.0]),
        ):
            file.write("\n" + json.dumps({**shape, "step": step, "model": model, "cells": [cells]}))
    found = curves(read(run, "one", COLOURS[0]), "text")
    assert [(name, points) for name, _, points in found] == [
        ("teacher", [(12, 1.0), (36, 0.5)]),
        ("step 0", [(12, 3.0), (36, 4.0)]),
        ("step 20", [(12, 1.5), (36, 1.0)]),
    ]
    html = build(run, [], None).read_text()
    Checked(html)
    section = html[html.index('<section id="positions">') :]
    assert re.findall(r">(teacher|step \d+)</text>", section[: section.index("</section>")]) == [
        "teacher",
        "step 0",
        "step 20",
    ]
    maps = html[html.index('<section id="heatmaps">') :]
    assert "nll_by_position" not in maps[: maps.index("</section>")]
