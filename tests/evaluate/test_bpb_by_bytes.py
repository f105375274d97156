"""Bits per byte at equal bytes: a uniform model scores log2(V) bits a token, whatever the rows."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from adapt.components import suites
from adapt.config import resolve
from adapt.data.stream import eval_batches
from adapt.evaluate.context import EvalContext
from adapt.models import attention
from adapt.objectives.base import Facts
from adapt.train.root import Root, look
from adapt.train.validate import check
from tests import tiny
from tests.data.helpers import make_shards
from tests.recipes import tiny_recipe


def measured(tmp_path, *, limit=None, row_bytes=64, uniform=True) -> dict[str, float]:
    tokenizer = tiny.tiny_tokenizer()
    texts = [f"page {i}: the model reads {i * 37} noisy words. " * 4 for i in range(12)]
    shards = make_shards(tmp_path, [tokenizer(t)["input_ids"] for t in texts])
    model = tiny.tiny_model("llama")
    if uniform:
        torch.nn.init.zeros_(model.get_output_embeddings().weight)
    context = EvalContext(
        call=partial(look, Root(attention.use(model)).eval()),
        tokenizer=tokenizer,
        eval_sets={"text": partial(eval_batches, shards, 32, 4, limit)},
        facts=Facts(),
    )
    entry = suites["bpb_by_bytes"]
    return entry.factory(entry.config_type(row_bytes=row_bytes))(context)


def test_a_uniform_model_scores_log2_v_bits_a_token(tmp_path):
    """Spec C.4, invariant 14."""
    found = measured(tmp_path)
    vocabulary = tiny.tiny_model("llama").config.vocab_size
    assert found["bpb_by_bytes/text"] == pytest.approx(math.log2(vocabulary) * found["tokens_per_byte/text"], rel=1e-5)


def test_longer_rows_are_longer_contexts(tmp_path):
    short, long = (measured(tmp_path / str(n), row_bytes=n, uniform=False) for n in (16, 64))
    assert short["bpb_by_bytes/text"] != long["bpb_by_bytes/text"]


def test_held_out_sets_that_end_at_a_token_are_refused(tiny_base, tmp_path):
    recipe = tiny_recipe(tiny_base, tmp_path)
    recipe["data"]["eval"][0]["max_tokens"] = 500
    recipe["evaluation"]["suites"] = [{"name": "bpb_by_bytes", "row_bytes": 4}]
    told = "\n".join(map(str, check(resolve(recipe), offline=True).problems))
    assert "data.eval[0].max_tokens" in told
    assert "row_bytes=4" in told
