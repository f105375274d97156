"""From a recipe to the things a stage trains: tokenizer, student (converted, with adapters), teacher, sharded root."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapt.config.schema import Recipe, Trainable
from adapt.conversion.base import apply_conversions, filled_rows, reads_layers
from adapt.conversion.mixers import converted_layers, created_parameters, learning_layers
from adapt.distributed.shard import make_mesh, shard
from adapt.distributed.sharded_start import fill
from adapt.distributed.world import World
from adapt.errors import Problem, UserError
from adapt.models import attention
from adapt.objectives.base import Facts
from adapt.pretrained import load_model
from adapt.pretrained.families import longest_row
from adapt.pretrained.lora import add_lora
from adapt.pretrained.outline import WeightFiles, load_outline
from adapt.tokenization.vocabulary import Vocabulary
from adapt.train.frozen_rows import row_parameters
from adapt.train.recompute import checkpoint_layers
from adapt.train.root import Root
from adapt.train.trainable import select


def build_student(recipe: Recipe, tokenizer, decided: dict[str, Any] | None = None) -> nn.Module:
    """The student on the CPU: base weights, conversions in order, adapters, our attention. `tokenizer` may gain one.
    `decided`: what conversions found when the run began (apply_conversions); what is missing is added."""
    return _converted(recipe, load_model(recipe), tokenizer, decided)


def _converted(recipe: Recipe, model: nn.Module, tokenizer, decided: dict[str, Any] | None) -> nn.Module:
    model = apply_conversions(recipe, model, tokenizer, decided)
    if recipe.trainable.lora is not None:
        model = add_lora(model, recipe.trainable.lora, recipe.run.seed)  # the same adapters on every rank
    return attention.use(model)


def build_root(recipe: Recipe, tokenizer, world: World, decided: dict[str, Any] | None = None) -> Root:
    """On the device, checkpointed, compiled and sharded as the recipe says. In a group no rank holds the whole model, unless
    a conversion has to see its layers: then each builds it on the CPU first. `decided` as in build_student."""
    trainer = recipe.trainer
    outline = load_outline(recipe) if world.grouped and not reads_layers(recipe) else None
    model = outline[0] if outline else load_model(recipe)
    student = _converted(recipe, model, tokenizer, decided)
    checkpoint_layers(student, trainer.activation_checkpointing)
    student.config.use_cache = False
    if trainer.compile:
        attention.keep_out_of_graphs()
        for layer in student.get_decoder().layers:
            layer.compile()
    root = Root(student)
    place(root, student, outline[1] if outline else None, recipe, world)
    return root.train()


def place(root: nn.Module, model: nn.Module, files: WeightFiles | None, recipe: Recipe, world: World) -> None:
    """On the device, sharded where there is a group: layer by layer, so that no GPU holds the whole model. What `files`
    have of it is read into the shards. Raises UserError for a mesh that this world cannot be."""
    mesh = recipe.trainer.mesh
    if not world.grouped:
        if mesh.offload:
            what = "true: weights can wait on the CPU for a GPU, and this run has one CPU process; leave it out"
            raise UserError(Problem("trainer.mesh.offload", what))
        root.to(world.device)
        return
    shard(root, [model], make_mesh(world, mesh), compute_dtype(recipe, world), mesh.offload)
    if files is not None:
        fill(model, files, torch.device("cpu") if mesh.offload else world.device, recipe.run.seed)


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
        converted=converted_layers(model),
    )


def whole_student(recipe: Recipe, root: Root) -> nn.Module:
    """The trained student of a single process as a plain CPU model with adapters merged."""
    import copy

    from adapt.pretrained.lora import merge_lora

    model = copy.deepcopy(root.student).cpu()
    model = merge_lora(model) if recipe.trainable.lora is not None else model
    model.activation_checkpointing_disable()
    model.config.use_cache = True
    model.set_attn_implementation("sdpa")
    return model.eval().requires_grad_(False)
