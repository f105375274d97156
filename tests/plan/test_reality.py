"""Plan, tracker and the resident memory of real ranks, side by side.

glibc keeps freed memory unless it is told otherwise, about as much again as a step needs; with the two settings below what
is freed goes back, as it does on a GPU (which has an allocator of its own, and that is in no plan).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapt.plan.fake import fake_ranks, observe
from adapt.plan.memory import moments
from tests.plan.stages import planned, recipe_of

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ROWS, LENGTH, RANKS = 2, 512, 2
ARCH = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "vocab_size": 10000, "tie_word_embeddings": False,
}  # fmt: skip


def recipe(checkpointing: bool):
    return recipe_of(arch=ARCH, data={"seq_len": LENGTH}, trainer={"activation_checkpointing": checkpointing})


def measure(checkpointing: bool, out: Path) -> None:
    """On one rank: growth of its resident memory from before its shards to the peak of a forward and backward."""
    from transformers import AutoModelForCausalLM

    from adapt.config.schema import Mesh
    from adapt.distributed.shard import make_mesh, shard
    from adapt.distributed.world import World
    from adapt.models import attention
    from adapt.objectives.base import Facts
    from adapt.plan.fake import whole_rows
    from adapt.pretrained.arch import arch_config
    from adapt.train.root import Root

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    world = World(rank, rank, RANKS, RANKS, torch.device("cpu"))

    def step(arch: dict) -> tuple[float, int]:
        """(memory before anything is there, peak), in bytes."""
        config = arch_config(recipe(checkpointing).model.arch | arch)
        with torch.device("meta"):
            model = attention.use(AutoModelForCausalLM.from_config(config))
        root = Root(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        shard(root, [model], make_mesh(world, Mesh()), torch.float32)
        objective = recipe(checkpointing).objective.build(Facts())
        inputs = objective.prepare(whole_rows(recipe(checkpointing), config, ROWS), seed=0, step=0).inputs
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        root.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in root.parameters():
                parameter.to_local().normal_(0, 0.02)
            for name, buffer in model.named_buffers():
                buffer.zero_() if "attention_scaling" not in name else buffer.fill_(1)
        root.train()
        sum(root(objective, inputs).values()).backward()
        return before, status("VmHWM")

    step({"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12})
    before, peak = step({})
    if rank == 0:
        out.write_text(json.dumps(peak - before))
    torch.distributed.destroy_process_group()


def status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_and_tracked_memory_are_what_real_ranks_take(checkpointing, tmp_path):
    out = tmp_path / "grown.json"
    code = f"from pathlib import Path; from tests.plan.test_reality import measure; measure({checkpointing}, Path({str(out)!r}))"
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **GIVEN_BACK}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | common | {"RANK": str(rank)})
        for rank in range(RANKS)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0] * RANKS
    measured = json.loads(out.read_text())
    plan = planned(recipe(checkpointing), RANKS)
    with fake_ranks(RANKS) as world:
        tracked = observe(plan.recipe, plan.student.config, None, world, rows=ROWS, compute=torch.float32).memory[
            "Total"
        ]
    setup = dataclasses.replace(plan.setup, device="cpu", compute=4)
    found = moments(plan.student, None, plan.work, plan.optimizer, setup, ROWS, accumulated=False)
    formula = max(moment.total - moment.kinds["optimizer"] for moment in found)
    print(
        f"{plan.student.parameters():,} parameters: planned {formula:,.0f}, tracked {tracked:,}, measured {measured:,}"
    )
    assert tracked == pytest.approx(measured, rel=0.1)
    assert formula == pytest.approx(measured, rel=0.1)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
