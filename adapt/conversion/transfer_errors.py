"""How well each layer's attention can be imitated, measured: a short attention transfer of all of them at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from adapt.conversion.calibration import refuse_unread
from adapt.data.batch import Batch
from adapt.data.noise import generator
from adapt.models import attention
from adapt.objectives.attention_transfer import AttentionTransfer
from adapt.objectives.base import Facts, Models

log = logging.getLogger(__name__)

RATE = 1e-2
"""Learning rate of LAWCAT's stage 1, where it begins; it falls to nothing, so that layers are compared at rest."""
WORST = 1e6
"""The error of a layer that diverged."""


def transfer_errors(student: Any, batches: Iterable[Batch], layers: Iterable[int], seed: int) -> dict[int, float]:
    """Relative error of the heads (|student - teacher|^2 / |teacher|^2, mean over tokens) of each of `layers`, after
    one step of attention transfer on each of three quarters of `batches`, on the other quarter.

    Teacher forcing makes layers independent, so one run measures all of them, whatever is converted in the end. What
    the conversion created in `layers` is changed, nothing else. Raises UserError for text that the model cannot read."""
    layers, batches = tuple(layers), list(batches)
    order = generator(seed, 0).permutation(len(batches))  # sources come one after the other
    batches = [batches[i] for i in order]
    learned = max(1, len(batches) * 3 // 4)
    log.info("measuring how well %d layers can be imitated: %d steps", len(layers), learned)
    mine = {f"model.layers.{i}.self_attn.{type(student.model.layers[i].self_attn).created}." for i in layers}
    parameters = [p for name, p in student.named_parameters() if name.startswith(tuple(mine))]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    objective = AttentionTransfer(Facts(learning=layers), scale=1.0)
    attention.use(student).eval()
    models, device = Models(student), student.device

    def run(batch: Batch, step: int):
        refuse_unread(student, batch)
        prepared = objective.prepare(batch, seed=seed, step=step)
        return objective(models, prepared.to(device).inputs), prepared.terms["transfer"].count

    with torch.enable_grad():
        for step, batch in enumerate(batches[:learned]):
            found, count = run(batch, step)
            gradients = torch.autograd.grad(found["transfer"] / max(1, count), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / learned)
            optimizer.step()
    sums, total = torch.zeros(len(layers), dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches[learned:] or batches:
            found, count = run(batch, 0)
            sums += torch.stack([found[f"relative_error/{i:02d}"] for i in layers]).cpu()
            total += count
    errors = torch.nan_to_num(sums / max(1, total), nan=WORST, posinf=WORST).clamp_max(WORST)
    return dict(zip(layers, errors.tolist(), strict=True))
