"""Suites on a model sharded over two processes give what one process gives: sums, prompts and decoding included."""

from __future__ import annotations

import json
import os

import pytest
import torch

from tests import tiny
from tests.batches import packed
from tests.generation.reference import MASK


def rows(rank: int, world: int):
    """This rank's rows of a held-out set of four; with padding, as the real stream has it."""
    lengths = [[13, 9, 2], [24], [5, 19], [17, 7]]
    whole = packed(lengths, pad=3)
    return iter([whole.rows(i, i + 1) for i in range(rank, len(lengths), world)])


def measure(rank: int, world: int) -> dict[str, float]:
    from adapt.components import SuiteChoice
    from adapt.config import decode
    from adapt.config.schema import Mesh
    from adapt.distributed.shard import make_mesh, shard
    from adapt.distributed.world import World
    from adapt.evaluate.context import EvalContext
    from adapt.generation.contract import Contract
    from adapt.models import attention
    from adapt.objectives.base import Facts
    from adapt.train.root import Root

    here = World(rank, rank, world, world, torch.device("cpu"))
    root = Root(attention.use(tiny.tiny_model("llama", dtype=torch.float64))).eval()
    if world > 1:
        shard(root, [root.student], make_mesh(here, Mesh()), torch.float64)

    def call(fn, *args):
        with torch.no_grad():
            return root(fn, *args)

    context = EvalContext(
        call=call,
        tokenizer=tiny.tiny_tokenizer(),
        eval_sets={"text": lambda: rows(rank, world)},
        reduce=lambda sums: dict(zip(sums, here.sum([float(v) for v in sums.values()]), strict=True)),
        facts=Facts(mask_token_id=MASK),
        contract=Contract(block_size=4),
    )
    results = {}
    for name, fields in SUITES.items():
        results |= decode({"name": name, **fields}, SuiteChoice).build()(context)
    return results | compared(context, here)


def compared(context, here) -> dict[str, float]:
    """A student with a recurrent layer, beside its base and a window, each a root of its own."""
    from contextlib import nullcontext
    from dataclasses import replace
    from functools import partial

    from adapt.components import SuiteChoice
    from adapt.config import decode
    from adapt.config.schema import Mesh
    from adapt.distributed.shard import make_mesh, shard
    from adapt.models import attention
    from adapt.train.root import Frozen, Root, look, look_at
    from tests.models.linear import student

    root = Root(attention.use(student(layers=(0,)))).eval()
    frozen = Frozen(attention.use(tiny.tiny_model(dtype=torch.float64)))
    if here.size > 1:
        shard(root, [root.student], make_mesh(here, Mesh()), torch.float64)
        shard(frozen, [frozen.model], make_mesh(here, Mesh()), torch.float64)
    context = replace(context, call=partial(look, root), base=lambda: nullcontext(partial(look_at, frozen)))
    fields = {"lengths": (250, 280, 300), "depths": 1, "trials": 1, "compare": ("teacher", "window")}
    results = decode({"name": "passkey", **fields}, SuiteChoice).build()(context)
    small = {"lengths": (250,), "depths": 1, "trials": 1}
    for suite in ({"name": "ablation", **small}, {"name": "half_lives"}, {"name": "bpb"}):
        results |= decode(suite, SuiteChoice).build()(context)
    assert results["bpb/text"] == results["ablation/whole/bpb/text"], "every part is back in its place"
    return results


SUITES = {
    "bpb": {},
    "masked_ce": {"t": (0.5, 1.0)},
    "tokens_per_forward": {"thresholds": (0.9, 0.05), "num_prompts": 3, "prompt_tokens": 8, "new_tokens": 9},
    "passkey": {"lengths": (260, 400, 290), "depths": 1, "trials": 1},
    "niah": {"lengths": (400,), "depths": 3, "trials": 1, "new_tokens": 5},
    "exact_match": {"source": {"name": "arithmetic", "count": 3}, "max_new_tokens": 4},
}


def worker(rank: int, store: str, out: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = measure(rank, 2)
    with open(os.path.join(out, f"{rank}.json"), "w") as file:
        json.dump(results, file)
    dist.destroy_process_group()


def test_two_ranks_measure_what_one_does(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    one = measure(0, 1)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] == pytest.approx(one, rel=1e-9)
