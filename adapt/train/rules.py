"""Rules of the sections the core reads: ranges, and what only makes sense together. Nothing is opened or loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapt.config import Recipe
from adapt.errors import Problem, UserError
from adapt.optim.following import following_problems
from adapt.train.mixing import mixing_problems


def core_problems(recipe: Recipe, index: int) -> Iterator[Problem]:
    """Of the stage number `index`."""
    yield from _run(recipe, index)
    yield from _model(recipe)
    yield from _data(recipe)
    yield from _trainer(recipe)
    yield from _evaluation(recipe)
    yield from _interpolation(recipe)
    yield from following_problems(recipe)
    yield from _ranges(recipe)


def _run(recipe: Recipe, index: int) -> Iterator[Problem]:
    name = recipe.run.name
    if not re.fullmatch(r"[^\W_][\w.+=@-]*", name):
        yield Problem("run.name", f"{name!r} is no folder name; use letters, digits and . _ - + = @")
    folder = Path(recipe.run.dir)
    if any(p.exists() and not p.is_dir() for p in (folder, *folder.parents)):
        yield Problem("run.dir", f"{recipe.run.dir} leads through a file; run folders cannot be made there")
    if index == 0 and recipe.optimizer_state == "keep":
        yield Problem("optimizer_state", "the first stage has no optimizer before it to keep; leave it out")
    if recipe.logging.wandb is not None and find_spec("wandb") is None:
        yield Problem("logging.wandb", "needs wandb: pip install 'adapt-lm[loggers]', or set it to null")
    lora = recipe.trainable.lora
    if lora is not None and not 0 <= lora.dropout < 1:
        yield Problem("trainable.lora.dropout", f"{lora.dropout} must be in [0, 1)")
    if lora is not None and not lora.targets:
        yield Problem("trainable.lora.targets", "names no module; leave it out for all linear ones")
    if recipe.trainable.rows == "new" and lora is not None:
        yield Problem(
            "trainable.rows", "with lora only the adapters train, and they have no rows; leave one of them out"
        )
    if recipe.trainable.rows == "new" and not any(c.declares("fills_rows") for c in recipe.model.conversions):
        what = "new: nothing adds rows here; extend the vocabulary in model.conversions, or leave it out"
        yield Problem("trainable.rows", what)
    if not recipe.trainable.include:
        yield Problem("trainable.include", "is empty, so nothing would train; ['*'] is every parameter")
    for index, prompt in enumerate(recipe.generation.prompts):
        if not prompt:
            yield Problem(
                f"generation.prompts[{index}]", "is empty, so there is nothing to go on from; write some text"
            )
    if recipe.generation.prompts and not recipe.generation.samplers:
        yield Problem("generation.samplers", "there are prompts and no sampler to decode them with; add e.g. ar")


def _model(recipe: Recipe) -> Iterator[Problem]:
    if recipe.tokenizer.path is not None and recipe.tokenizer.recipe is not None:
        what = (
            f"builds a tokenizer, and tokenizer.path={recipe.tokenizer.path!r} names one that is there; leave one out"
        )
        yield Problem("tokenizer.recipe", what)
    if recipe.model.attention == "flex" and not _cuda_devices():
        yield Problem("model.attention", "flex needs a CUDA device, and there is none here; use auto or tiled")
    needs = learners(recipe)
    if recipe.teacher is not None and not needs:
        name = recipe.objective.name
        yield Problem(
            "teacher",
            f"the objective {name} learns from no teacher here and no suite compares with one, so this would do "
            "nothing; leave it out",
        )
    if recipe.teacher is None and needs:
        yield Problem("teacher", f"{needs[0]} needs a teacher; add the section (base: self | <model>)")


def learners(recipe: Recipe) -> list[str]:
    """What needs a teacher, in words."""
    found = [f"the objective {recipe.objective.name}"] if recipe.objective.declares("needs_teacher") else []
    return found + [f"the suite {s.name}" for s in recipe.evaluation.suites if s.declares("needs_teacher")]


def _data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    yield from mixing_problems(recipe)
    for part in ("train", "eval"):
        for index, dataset in enumerate(getattr(data, part)):
            if dataset.max_tokens is not None and dataset.max_tokens < 1:
                yield Problem(f"data.{part}[{index}].max_tokens", f"{dataset.max_tokens} must be 1 or more")
            if dataset.document_weight is not None:
                yield from _document_weight(f"data.{part}[{index}].document_weight", dataset.document_weight)
    for index, dataset in enumerate(data.eval):
        if dataset.replay:
            what = "replay is part of the training data; held-out data that must not get worse is marked `guard: true`"
            yield Problem(f"data.eval[{index}].replay", what)
    for index, dataset in enumerate(data.train):
        if dataset.guard:
            what = "guards are held-out data; training data of the old kind is marked `replay: true`"
            yield Problem(f"data.train[{index}].guard", what)
    if data.near_dedup is not None and not 0 < data.near_dedup < 1:
        yield Problem("data.near_dedup", f"{data.near_dedup} must be between 0 and 1; 0.8 is usual, null turns it off")
    if data.decontaminate is not None and data.decontaminate < 2:
        yield Problem("data.decontaminate", f"{data.decontaminate} words are in every text; 13 is usual, null is off")
    if data.workers != "auto" and data.workers < 1:
        yield Problem("data.workers", f"{data.workers} must be 1 or more; auto is one per usable CPU")
    if not 0 <= data.max_bad_lines <= 1:
        yield Problem("data.max_bad_lines", f"{data.max_bad_lines} is a fraction of the lines: from 0 to 1")


def _document_weight(where: str, expression: str) -> Iterator[Problem]:
    from adapt.data.document_weights import DocumentWeight

    try:
        DocumentWeight(expression)
    except UserError as error:
        yield from (Problem(where, p.what) for p in error.problems)


def _trainer(recipe: Recipe) -> Iterator[Problem]:
    trainer, data = recipe.trainer, recipe.data
    if (trainer.steps is None) == (trainer.tokens is None):
        have = "neither is given" if trainer.steps is None else f"steps={trainer.steps} and tokens={trainer.tokens:,}"
        yield Problem("trainer", f"give exactly one of steps and tokens (how long to train); here {have}")
    if trainer.timeout < 1:
        yield Problem("trainer.timeout", f"{trainer.timeout} s is no time to wait; give 1 or more")
    if trainer.start_timeout < 1:
        yield Problem("trainer.start_timeout", f"{trainer.start_timeout} s is no time to come; give 1 or more")
    if trainer.max_time is not None and not re.fullmatch(r"(\d+:)?\d+:\d\d:\d\d", trainer.max_time):
        yield Problem("trainer.max_time", f"{trainer.max_time!r} is not HH:MM:SS or DD:HH:MM:SS")
    ranks = known_ranks(recipe)
    if data.seq_len < 2:
        yield Problem("data.seq_len", f"{data.seq_len} leaves nothing to predict; 512 to 8192 is usual")
    elif trainer.batch_tokens < data.seq_len * ranks or trainer.batch_tokens % (data.seq_len * ranks):
        step = data.seq_len * ranks
        better = max(1, round(trainer.batch_tokens / step)) * step
        over = f" x {ranks} ranks" if ranks > 1 else ""
        yield Problem(
            "trainer.batch_tokens",
            f"{trainer.batch_tokens:,} is not a multiple of data.seq_len={data.seq_len:,}{over}; try {better}",
        )
    mesh = trainer.mesh
    shard = 1 if mesh.shard == "auto" else mesh.shard
    wrong = ranks % max(1, shard * mesh.replicate) if mesh.shard == "auto" else ranks != shard * mesh.replicate
    if wrong:
        yield Problem(
            "trainer.mesh",
            f"shard={mesh.shard} x replicate={mesh.replicate} does not make {ranks} rank(s), which is what "
            f"trainer.devices={trainer.devices} gives here; start it with torchrun or srun, or leave the mesh to `auto`",
        )
    if trainer.precision == "bf16" and ranks == 1 and not _cuda_devices():
        yield Problem(
            "trainer.precision",
            "bf16 compute over fp32 weights needs a GPU or several processes; on one CPU process use fp32 "
            "(bf16 is many times slower there anyway)",
        )
    if trainer.non_finite == "rewind" and not recipe.checkpoint.every:
        yield Problem("checkpoint.every", "trainer.non_finite=rewind needs checkpoints to go back to; set it")
    if trainer.spike is not None and not trainer.spike > 1:
        yield Problem("trainer.spike", f"{trainer.spike:g} times the usual gradient norm is no spike; 5 to 10 is usual")


def known_ranks(recipe: Recipe) -> int:
    """Processes a run started here, like this, would have."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if (tasks := int(os.environ.get("SLURM_NTASKS", "1"))) > 1:
        return tasks
    wanted = recipe.trainer.devices
    return max(1, wanted if isinstance(wanted, int) else _cuda_devices())


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _evaluation(recipe: Recipe) -> Iterator[Problem]:
    evaluation, data = recipe.evaluation, recipe.data
    if (evaluation.best or evaluation.stop) and not evaluation.suites:
        yield Problem("evaluation.suites", "best and stop rules need something measured; add a suite, e.g. bpb")
    needing = [s.name for s in evaluation.suites if not s.declares("brings_data")]
    if needing and not data.eval:
        names = ", ".join(dict.fromkeys(needing))
        yield Problem("data.eval", f"{names}: measured on held-out data, and there is none; add a source")
    for index, rule in enumerate(evaluation.stop):
        for key in ("above", "below"):
            limit = getattr(rule, key)
            if limit is not None and not math.isfinite(limit):
                yield Problem(f"evaluation.stop[{index}].{key}", f"{limit} is no number that anything could pass")
        if rule.above is None and rule.below is None and rule.patience is None:
            yield Problem(f"evaluation.stop[{index}]", "says nothing; give above, below or patience")


def _interpolation(recipe: Recipe) -> Iterator[Problem]:
    wanted, where = recipe.export.interpolation, "export.interpolation"
    if wanted is None:
        return
    if recipe.trainable.lora is not None:
        what = "halfway between two adapters is not half of their effect; scale trainable.lora.alpha, or leave this out"
        yield Problem(where, what)
    if (wanted.alpha is None) == (wanted.minimise is None):
        have = "neither is given" if wanted.alpha is None else "both are given"
        yield Problem(where, f"give exactly one of alpha (export this one) and minimise (a metric); here {have}")
    if wanted.minimise is None and wanted.limits:
        yield Problem(f"{where}.limits", "limits choose among alphas by a metric: give minimise, or leave them out")
    if wanted.minimise is not None and not wanted.alphas:
        yield Problem(f"{where}.alphas", "is empty, so there is nothing to choose from; 0, 0.25, ..., 1 is usual")
    if wanted.minimise is not None and not recipe.evaluation.suites:
        yield Problem("evaluation.suites", f"{where} needs something measured; add a suite, e.g. bpb")
    for alpha in (*wanted.alphas, *([] if wanted.alpha is None else [wanted.alpha])):
        if not 0 <= alpha <= 1:
            yield Problem(where, f"alpha {alpha} must be between 0 (the start) and 1 (the trained model)")


AT_LEAST = {
    "trainer.steps": (0, "0 converts and exports"),
    "trainer.tokens": (0, "0 converts and exports"),
    "trainer.batch_tokens": (1, ""),
    "trainer.microbatch": (1, "rows, or auto"),
    "trainer.devices": (1, "processes, or auto"),
    "trainer.max_non_finite": (1, ""),
    "trainer.mesh.shard": (1, "or auto"),
    "trainer.mesh.replicate": (1, ""),
    "trainable.lora.rank": (1, ""),
    "evaluation.every": (1, "steps, or null: only at the start and the end"),
    "evaluation.limit": (1, "rows, or null: all"),
    "checkpoint.every": (1, "steps, or null: only at the end"),
    "checkpoint.keep": (1, ""),
    "logging.every": (1, ""),
    "generation.max_new_tokens": (1, ""),
}
ABOVE_ZERO = {
    "trainer.clip": "null turns clipping off",
    "trainable.lora.alpha": "twice the rank is usual",
    "checkpoint.every_minutes": "null: by steps alone",
}


def _ranges(recipe: Recipe) -> Iterator[Problem]:
    for key, (least, hint) in AT_LEAST.items():
        value = _get(recipe, key)
        if isinstance(value, int) and value < least:
            yield Problem(key, f"{value} must be {least} or more" + (f" ({hint})" if hint else ""))
    for key, hint in ABOVE_ZERO.items():
        value = _get(recipe, key)
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield Problem(key, f"{value} must be above 0 ({hint})")
    for index, rule in enumerate(recipe.evaluation.stop):
        if rule.patience is not None and rule.patience < 1:
            yield Problem(f"evaluation.stop[{index}].patience", f"{rule.patience} must be 1 or more evaluations")


def _get(value: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        value = getattr(value, key, None)
    return value
