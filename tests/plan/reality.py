"""Real ranks on this machine, and what a forward and backward adds to their resident memory.

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
from typing import Any

import torch

from adapt.config.schema import Recipe
from adapt.plan.fake import built, fake_ranks, observe, one_kernel
from adapt.plan.memory import moments
from tests.plan.stages import planned, recipe_of

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ROWS, LENGTH, RANKS = 2, 512, 2
ARCH = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "vocab_size": 10000, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 12}
"""What a first step of it leaves behind in libraries is there before the second is measured."""
TAUGHT = {"teacher": {"base": "self"}}
BLOCKS = {"mixer": 0.0, "block": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "next_token": {},
    "block_diffusion": {
        "conversions": [{"name": "mask_token", "id": 999}],
        "objective": {"name": "block_diffusion", "block_size": 32},
    },
    "logit_distillation": {"objective": "logit_distillation", **TAUGHT},
    "layer_alignment, lawcat's mixers": {
        "conversions": ["lawcat"], "objective": "layer_alignment", "trainable": {"include": ["*.self_attn.*"]}, **TAUGHT,
    },
    "layer_alignment, latent blocks": {
        "conversions": [{"name": "xecomla", "latent_norm": "none", "kv_rank": 96}],
        "objective": {"name": "layer_alignment", **BLOCKS}, "trainable": {"include": ["*.layers.*"]}, **TAUGHT,
    },
}  # fmt: skip


def recipe(case: str, checkpointing: Any, **arch: Any) -> Recipe:
    trainer = {"activation_checkpointing": checkpointing, "precision": "fp32"}
    return recipe_of(arch=ARCH | arch, data={"seq_len": LENGTH}, trainer=trainer, **CASES[case])


def measured(case: str, checkpointing: Any, place: Path) -> int:
    """Bytes that the first of real ranks grows by, from before its shards are there to the peak of a microbatch."""
    out = place / "grown.json"
    code = f"from pathlib import Path; from tests.plan.reality import rank; rank({case!r}, {checkpointing!r}, Path({str(out)!r}))"
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **GIVEN_BACK}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | common | {"RANK": str(i)}) for i in range(RANKS)
    ]
    try:
        ended = [process.wait(timeout=600) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert ended == [0] * RANKS, f"ranks ended with {ended}"
    return json.loads(out.read_text())


def rank(case: str, checkpointing: Any, out: Path) -> None:
    from adapt.distributed.world import World

    torch.set_num_threads(1)
    index = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    world = World(index, index, RANKS, RANKS, torch.device("cpu"))
    _grown(recipe(case, checkpointing, **SMALL), world)
    grown = _grown(recipe(case, checkpointing), world)
    if index == 0:
        out.write_text(json.dumps(grown))
    torch.distributed.destroy_process_group()


def _grown(recipe: Recipe, world: Any) -> int:
    plan = planned(recipe, RANKS)
    teacher = plan.teacher and plan.teacher.config
    root, objective, prepared = built(recipe, plan.student.config, teacher, world, rows=ROWS, compute=torch.float32)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for model in (root, *([root.teacher] if root.teacher is not None else [])):
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().normal_(0, 0.02)
            for name, buffer in model.named_buffers():
                buffer.fill_(float("attention_scaling" in name))
    with one_kernel(prepared):
        found = root.train()(objective, prepared.inputs)
        sum(prepared.terms[n].weight * found[n] for n in prepared.terms).backward()
    return status("VmHWM") - before


def status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def foretold(case: str, checkpointing: Any) -> tuple[float, int | None]:
    """(the plan's, what torch's tracker finds, where it can follow) of that microbatch, in bytes, without the optimizer."""
    plan = planned(recipe(case, checkpointing), RANKS)
    teacher = plan.teacher and plan.teacher.config
    with fake_ranks(RANKS) as world:
        seen = observe(plan.recipe, plan.student.config, teacher, world, rows=ROWS, compute=torch.float32)
    setup = dataclasses.replace(plan.setup, device="cpu", compute=4)
    found = moments(plan.student, plan.teacher, plan.work, plan.optimizer, setup, ROWS, accumulated=False)
    return max(moment.total - moment.kinds["optimizer"] for moment in found), seen.memory.get("Total")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
