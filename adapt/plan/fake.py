"""One microbatch of the real step on a fake process group: our modules, our wrapping, our objective, no memory, no network.

Rank 0 of as many ranks as asked for runs under FakeTensorMode, where tensors have shapes and nothing else. What it hands to
its collectives is counted byte by byte, and every storage is followed from its birth to its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from adapt.config.schema import Recipe
from adapt.data.batch import TARGET, Batch
from adapt.distributed.shard import make_mesh, shard
from adapt.distributed.world import World
from adapt.errors import UserError
from adapt.models import attention
from adapt.objectives.base import Facts, Prepared
from adapt.optim.state_bytes import plain_tensors
from adapt.plan.work import fact
from adapt.train.recompute import checkpoint_layers
from adapt.train.root import Frozen, Root
from adapt.train.trainable import select

COUNTED = {
    torch.ops.c10d._allgather_base_.default: ("all_gather", 0),
    torch.ops.c10d._reduce_scatter_base_.default: ("reduce_scatter", 1),
    torch.ops.c10d.allreduce_.default: ("all_reduce", 0),
}
"""Collective -> its name, and which argument is the full buffer."""
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@dataclass(frozen=True)
class Seen:
    counts: dict[str, int]
    """Collective -> how many, of one microbatch."""
    bytes: dict[str, int]
    """Collective -> bytes of their full buffers."""
    memory: dict[str, int]
    """Kind -> bytes at the peak of forward and backward, as torch's tracker names them; `Total` is the peak. {} where it
    cannot follow."""
    state: int
    """Bytes of the optimizer's state on rank 0."""
    parameters: int
    flops: int
    """Of matrix products, forward and backward; those inside attention's and the cross-entropy's own are not among them."""


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in COUNTED:
            name, place = COUNTED[func]
            buffers = args[place] if isinstance(args[place], list | tuple) else [args[place]]
            self.counts[name] += 1
            self.bytes[name] += sum(b.numel() * b.element_size() for b in buffers)
        found = func(*args, **(kwargs or {}))
        if func._overloadpacket in PRODUCTS:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


@contextmanager
def fake_ranks(size: int) -> Iterator[World]:
    """Rank 0 of `size` ranks that are not there."""
    if dist.is_initialized():
        raise UserError("a plan is verified in a process of its own: this one is a rank of a run already")
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield World(0, 0, size, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def built(
    recipe: Recipe, config: Any, teacher: Any, world: World, *, rows: int, compute: torch.dtype
) -> tuple[Root, Any, Prepared]:
    """(root, objective, a microbatch) as a run has them, sharded, with every parameter on the meta device still."""
    mesh = make_mesh(world, recipe.trainer.mesh)  # before any fake tensor: it reads a tensor of ranks
    root = Root(_on_meta(config, recipe.model.dtype, recipe))
    student = root.student
    checkpoint_layers(student, recipe.trainer.activation_checkpointing)
    student.config.use_cache = False
    created = _created(student)
    shard(root, [student], mesh, compute)  # all of it on the CPU already, where `offload` takes it
    chosen = select([n for n, _ in student.named_parameters()], recipe.trainable, created)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in chosen)
    if teacher is not None:
        frozen = Frozen(_on_meta(teacher, recipe.teacher.dtype, None))
        shard(frozen, [frozen.model], mesh, compute)
        root.teach(frozen)
    objective = recipe.objective.build(_facts(recipe, student))
    if recipe.objective.declares("compares_with_start"):
        objective.remember(lambda batch: torch.zeros(batch.num_rows, dtype=torch.float64))
    batch = whole_rows(recipe, config, rows)
    return root, objective, objective.prepare(batch, seed=recipe.run.seed, step=objective.largest_step())


def observe(recipe: Recipe, config: Any, teacher: Any, world: World, *, rows: int, compute: torch.dtype) -> Seen:
    """Forward and backward of `rows` rows through student and teacher (configs; the latter may be None)."""
    root, objective, prepared = built(recipe, config, teacher, world, rows=rows, compute=compute)
    student = root.student
    state = _state_bytes(recipe.optimizer.build(student))  # on the meta device, of this rank's shards
    counted = Counted()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, one_kernel(prepared):
        for model in (root, *([root.teacher] if teacher is not None else [])):
            model.to_empty(device="cpu")
        inputs = _faked(prepared.inputs, fake)
        follows = _can_follow(recipe, student)
        tracker = FSDPMemTracker(root.train()) if follows else nullcontext()
        with tracker, counted:
            found = root(objective, inputs)
            sum(prepared.terms[n].weight * found[n] for n in prepared.terms).backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")] if follows else {}
    parameters = sum(p.numel() for p in student.parameters())
    memory = {str(k): int(v) for k, v in peak.items()}
    return Seen(dict(counted.counts), dict(counted.bytes), memory, state, parameters, counted.flops)


def _can_follow(recipe: Recipe, student: Any) -> bool:
    """Whether torch's tracker knows what is going on. It does not where gradients are formed on the way forward (`created`);
    it holds on to what no loss reads, as MLPs are where mixers alone are compared, a third more than real ranks take; and
    it fails on layers that never run, as those that were not converted."""
    from adapt.conversion.mixers import converted_layers

    inside = fact(recipe.objective, "inside_layers", "")
    return not inside or (inside == "block" and len(converted_layers(student)) == student.config.num_hidden_layers)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """As adapt.optim.state_bytes, for tensors whose memory has no address."""
    found = {}
    for leaf in tree_leaves(list(optimizer.state.values())):
        if isinstance(leaf, Tensor):
            found |= {s._cdata: s.nbytes() for s in (p.untyped_storage() for p in plain_tensors(leaf))}
    return sum(found.values())


def _on_meta(config: Any, dtype: str, recipe: Recipe | None) -> Any:
    from transformers import AutoModelForCausalLM

    from adapt.pretrained.lora import add_lora

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        if recipe is not None and recipe.trainable.lora is not None:
            model = add_lora(model, recipe.trainable.lora)
    return attention.use(model)


def _created(student: Any) -> set[str]:
    """The names of what conversions made, which float32 keeps."""
    from adapt.conversion.mixers import created_parameters

    created = created_parameters(student)
    for name, parameter in student.named_parameters():
        if name in created:
            parameter.data = parameter.data.float()
    return created


def _facts(recipe: Recipe, student: Any) -> Facts:
    from adapt.conversion.mixers import converted_layers, learning_layers
    from adapt.train.mixing import total_steps

    mask = getattr(student.config, "mask_token_id", None)
    return Facts(
        mask_token_id=student.config.vocab_size - 1 if mask is None else mask,  # the tokenizer may be out of reach
        replay=frozenset({0}) if any(d.replay for d in recipe.data.train) else frozenset(),
        learning=learning_layers(student),
        converted=converted_layers(student),
        total_steps=total_steps(recipe),
    )


def whole_rows(recipe: Recipe, config: Any, rows: int) -> Batch:
    """Rows of one document each, every token of which is learned: the most there can be."""
    length, index = recipe.data.seq_len, torch.arange(rows)
    ids = torch.arange(rows * length).view(rows, length) % max(2, config.vocab_size - 8)
    place = torch.arange(length).repeat(rows, 1)
    return Batch(
        input_ids=ids,
        labels=torch.where(place > 0, ids, -100),
        doc_ids=torch.zeros_like(ids),
        position_ids=place,
        role=torch.full(ids.shape, TARGET, dtype=torch.int8),
        loss_weight=torch.ones(ids.shape),
        sample_index=index,
        epoch=torch.zeros_like(index),
        source=torch.zeros_like(index),
        pair_index=index // 2 if recipe.objective.declares("pairs") else -torch.ones_like(index),
    )


def one_kernel(prepared: Prepared) -> Any:
    """A context in which a row's attention is one kernel without a mask, which keeps queries, keys, values, outputs and a
    number per query, as FlexAttention does. Which entries are seen changes neither shapes nor collectives."""
    rows, width = prepared.inputs["input_ids"].shape
    plan = attention.TilePlan(((attention.Tile(0, width, ((0, width),), None),),) * rows)
    return mock.patch.object(attention, "make_plan", return_value=plan)


def _faked(value: Any, fake: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return fake.from_tensor(value, static_shapes=True)
    if isinstance(value, dict):
        return {k: _faked(v, fake) for k, v in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: _faked(getattr(value, f.name), fake) for f in fields(value)})
    return value
