"""Steps that learn from a teacher, for `benchmarks/steps.py transfer` and `benchmarks/steps.py kd`.

`transfer`: attention transfer in one copy of the model, all layers recurrent, with its optimizer; against forward and
backward of the teacher alone on the same rows, next-token loss. `kd`: distillation from a frozen teacher of the student's
shape, forward and backward; against full logits of both models and `kl_div`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from adapt.conversion.lawcat import Lawcat, LawcatConfig
from adapt.conversion.mixers import created_parameters, learning_layers
from adapt.models import attention
from adapt.objectives.attention_transfer import AttentionTransfer
from adapt.objectives.base import Facts, Models
from adapt.objectives.logit_distillation import LogitDistillation, LogitDistillationConfig
from benchmarks.steps import make_batch, ours_next_token, peak, resident, smollm2


def run(case: str, arm: str, args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    batch = make_batch(1, args.L)
    transfer(1, batch)  # what a first model imports is no model's memory
    before = resident()
    student, step = {
        ("transfer", "teacher"): teacher_alone,
        ("transfer", "ours"): transfer,
        ("kd", "ours"): distilled,
        ("kd", "naive"): naively_distilled,
    }[case, arm](args.layers, batch)
    models = resident() - before
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if (case, arm) == ("transfer", "ours") else None
    for parameter in trained:  # gradients exist before memory is counted
        parameter.grad = torch.zeros_like(parameter)
    state, times = resident(), []
    for _ in range(args.steps + 1):
        started = time.process_time()
        for parameter in trained:
            parameter.grad = None
        step()
        if optimizer is not None:
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        times.append(time.process_time() - started)
    return {"seconds": statistics.median(times[1:]), "peak": peak(), "beyond": peak() - state, "models": models}


def teacher_alone(layers: int, batch) -> tuple[nn.Module, Callable]:
    model = smollm2(layers)
    return model, ours_next_token(model, batch)


def transfer(layers: int, batch) -> tuple[nn.Module, Callable]:
    student = Lawcat(LawcatConfig(), seed=0).apply(smollm2(layers), None)
    created = created_parameters(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in created)
    objective = AttentionTransfer(Facts(learning=learning_layers(student)), scale=1000.0)
    return student, stepping(objective, student, None, batch)


def distilled(layers: int, batch) -> tuple[nn.Module, Callable]:
    student, teacher = pair(layers)
    return student, stepping(LogitDistillation(LogitDistillationConfig(), Facts()), student, teacher, batch)


def naively_distilled(layers: int, batch) -> tuple[nn.Module, Callable]:
    student, teacher = pair(layers)

    def step() -> None:
        with torch.no_grad():
            theirs = teacher(batch.input_ids).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
        ours = student(batch.input_ids).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
        F.kl_div(ours, theirs, reduction="batchmean", log_target=True).backward()

    return student, step


def pair(layers: int) -> tuple[nn.Module, nn.Module]:
    """(student, frozen teacher)"""
    return smollm2(layers), smollm2(layers).eval().requires_grad_(False)


def stepping(objective, student: nn.Module, teacher: nn.Module | None, batch) -> Callable:
    for model in filter(None, (student, teacher)):
        attention.use(model)

    def step() -> None:
        item = objective.prepare(batch, seed=0, step=0)
        sums = objective(Models(student, teacher), item.inputs)
        sum(t.weight / t.count * sums[n] for n, t in item.terms.items() if t.weight).backward()

    return step
