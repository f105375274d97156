"""From a recipe to the things a stage trains: tokenizer, student (converted, with adapters), teacher, sharded root."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapt.config.schema import Recipe, Trainable
from adapt.conversion.base import apply_conversions, filled_rows
from adapt.conversion.mixers import created_parameters, learning_layers
from adapt.distributed.shard import make_mesh, shard
from adapt.distributed.world import World
from adapt.errors import Problem, UserError
from adapt.models import attention
from adapt.objectives.base import Facts
from adapt.pretrained import load_model
from adapt.pretrained.families import longest_row
from adapt.pretrained.lora import add_lora
from adapt.tokenization.vocabulary import Vocabulary
from adapt.train.frozen_rows import row_parameters
from adapt.train.root import Root
from adapt.train.trainable import select


def build_student(recipe: Recipe, tokenizer, decided: dict[str, Any] | None = None) -> nn.Module:
    """The student on the CPU: base weights, conversions in order, adapters, our attention. `tokenizer` may gain one.
    `decided`: what conversions found when the run began (apply_conversions); what is missing is added."""
    model = load_model(recipe)
    model = apply_conversions(recipe, model, tokenizer, decided)
    if recipe.trainable.lora is not None:
        torch.manual_seed(recipe.run.seed)  # the same adapters on every rank
        model = add_lora(model, recipe.trainable.lora)
    return attention.use(model)


def build_root(recipe: Recipe, student: nn.Module, world: World) -> Root:
    """On the device, checkpointed, compiled and sharded as the recipe says."""
    trainer = recipe.trainer
    if trainer.activation_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    student.config.use_cache = False
    if trainer.compile:
        attention.keep_out_of_graphs()
        for layer in student.get_decoder().layers:
            layer.compile()
    root = Root(student)
    if not world.grouped:
        root.to(world.device)
    else:  # moves to the device layer by layer: no GPU holds the whole model
        shard(root, [student], make_mesh(world, trainer.mesh), compute_dtype(recipe, world))
    return root.train()


def compute_dtype(recipe: Recipe, world: World) -> torch.dtype:
    """`auto` is bf16 where the GPU has it; a CPU computes in fp32 (bf16 is many times slower there)."""
    wanted = recipe.trainer.precision
    if wanted == "auto":
        wanted = "bf16" if world.device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if wanted == "bf16" and not world.grouped:
        raise UserError(
            Problem(
                "trainer.precision",
                "bf16 compute over fp32 weights needs a GPU or several processes; on one CPU process use fp32 "
                "(bf16 is many times slower there anyway)",
            )
        )
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def set_trainable(root: Root, trainable: Trainable) -> int:
    """Freeze and thaw. Returns the number of parameters that train. (Which rows of them: adapt.train.frozen_rows.)"""
    student = root.student
    chosen = select([n for n, _ in student.named_parameters()], trainable, created_parameters(student))
    by_row = row_parameters(student) if trainable.rows == "new" else {}
    if by_row and not filled_rows(student):
        what = "new: the conversions filled no row here (a mask token the model had was kept); leave it out"
        raise UserError(Problem("trainable.rows", what))
    total = 0
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in chosen)
        numel = len(filled_rows(student)) * parameter.shape[1] if name in by_row else parameter.numel()
        total += numel if name in chosen else 0
    return total


def facts_of(recipe: Recipe, model: nn.Module, tokenizer) -> Facts:
    return Facts(
        mask_token_id=getattr(model.config, "mask_token_id", None),
        attention=recipe.model.attention,
        replay=frozenset(i for i, dataset in enumerate(recipe.data.train) if dataset.replay),
        vocabulary=Vocabulary.of(tokenizer, model.config),
        positions=longest_row(model.config),
        learning=learning_layers(model),
    )


def whole_student(
    recipe: Recipe, tokenizer, root: Root, world: World, decided: dict[str, Any] | None = None
) -> nn.Module | None:
    """The trained student as a plain CPU model with adapters merged, on rank 0 (None elsewhere). Collective.
    `decided`: what it was built with (build_student)."""
    import copy

    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from adapt.pretrained.lora import merge_lora

    if world.grouped:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(root, options=options)
        weights = {n.removeprefix("student."): w for n, w in weights.items() if n.startswith("student.")}
        if not world.main:
            return None
        model = build_student(recipe, copy.deepcopy(tokenizer), decided)
        model.load_state_dict(weights)
    else:
        model = copy.deepcopy(root.student).cpu()
    model = merge_lora(model) if recipe.trainable.lora is not None else model
    model.activation_checkpointing_disable()
    model.config.use_cache = True
    model.set_attn_implementation("sdpa")
    return model.eval().requires_grad_(False)
