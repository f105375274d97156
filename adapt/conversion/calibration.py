"""What a layer's attention reads, on the recipe's own training text: measured once, before the model is converted.

Legend: d hidden size, n sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapt.config.schema import Recipe
from adapt.data.batch import PAD, Batch
from adapt.errors import Problem, UserError
from adapt.models import attention
from adapt.models.layout import Layout

SAMPLE = 1024
"""Tokens kept of each layer: the mean length of a latent is known to a percent from them."""
SHRINKAGE = 1e-2
"""Share of a scaled identity in the covariance: directions the few tokens missed keep some weight."""


@dataclass(frozen=True)
class Inputs:
    sample: Tensor
    """[n, d] of the tokens, evenly spread."""
    covariance: Tensor
    """[d, d] float64: mean of x xᵀ over all tokens, shrunk a little."""


def training_rows(recipe: Recipe, tokens: int) -> Iterator[Batch]:
    """About `tokens` of the training data, the same share of each source, the same rows whenever it is called."""
    from adapt.conversion.base import planned_tokenizer
    from adapt.data.prepare import prepare
    from adapt.data.stream import eval_batches

    shards = prepare(recipe, planned_tokenizer(recipe), progress=False).train
    read = [s for s, dataset in zip(shards, recipe.data.train, strict=True) if dataset.weight]
    rows = max(1, -(-tokens // (len(read) * recipe.data.seq_len)))
    for one in read:
        yield from eval_batches(one, recipe.data.seq_len, 2, rows)


def refuse_unread(model: nn.Module, batch: Batch) -> None:
    """Raises UserError where the text has tokens that the model gets from a conversion after this one."""
    rows, highest = model.get_input_embeddings().num_embeddings, int(batch.input_ids.max())
    if highest >= rows:
        what = f"the training text has token {highest:,}, and the model only {rows:,} rows so far; put conversions that add"
        raise UserError(Problem("", f"{what} tokens before this one, which measures the model on that text"))


@torch.no_grad()
def attention_inputs(
    model: nn.Module, batches: Iterable[Batch], layers: Iterable[int], tokens: int
) -> dict[int, Inputs]:
    """Of each of `layers`; `batches` as training reads them (packed documents apart, padding not counted), of about
    `tokens` in all."""
    found: dict[int, _Seen] = {i: _Seen(max(1, tokens // SAMPLE)) for i in layers}
    decoder, device = model.get_decoder(), next(model.parameters()).device
    real: Tensor | None = None

    def hook(index: int):
        def look(module, args, kwargs):
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            found[index].add(x[real])

        return look

    hooks = [decoder.layers[i].self_attn.register_forward_pre_hook(hook(i), with_kwargs=True) for i in found]
    try:
        with _our_attention(model):
            for batch in batches:
                refuse_unread(model, batch)
                real = (batch.role != PAD).to(device)
                layout = Layout.causal(batch.doc_ids, batch.position_ids).to(device)
                ids, positions = batch.input_ids.to(device), batch.position_ids.to(device)
                attention.hidden_states(model, ids, positions, layout)
    finally:
        for handle in hooks:
            handle.remove()
    return {i: seen.inputs() for i, seen in found.items()}


@contextmanager
def _our_attention(model: nn.Module) -> Iterator[None]:
    before, training = model.config._attn_implementation, model.training
    attention.use(model).eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


class _Seen:
    def __init__(self, every: int):
        self.every = every
        self.products: Tensor | None = None
        self.tokens = 0
        self.kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """[tokens, d]. Sums in float64: thousands of products of the same sign."""
        product = (x.float().T @ x.float()).double()
        self.products = product if self.products is None else self.products + product
        self.tokens += len(x)
        self.kept.append(x[:: self.every].float())

    def inputs(self) -> Inputs:
        covariance = self.products / self.tokens
        size = covariance.diagonal().mean()
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * size * torch.eye(
            len(covariance), dtype=covariance.dtype, device=covariance.device
        )
        return Inputs(torch.cat(self.kept), covariance)


def latent_rms(sample: Tensor):
    """down [r, d] -> mean over the sampled tokens of the latent's root mean square (spec 8.2: calibrated, never 1)."""

    def measure(down: Tensor) -> float:
        latent = sample.to(down.dtype) @ down.T
        return float(latent.square().mean(-1).sqrt().mean())

    return measure


def norm_gains(rows: Tensor, heads: int, gain: Tensor, sample: Tensor) -> Tensor:
    """rows [H * d_h, d] of a projection whose output each head normalises (QK-norm): the same rows with the norm's mean
    effect on them, diag(gain) / E[rms] per head (spec 2.10). The norm itself is not linear; training makes up for it."""
    per_head = rows.double().unflatten(0, (heads, -1))
    outputs = torch.einsum("nd,hrd->nhr", sample.double(), per_head)
    size = outputs.square().mean(-1).sqrt().mean(0)  # [H]
    return (per_head * gain.double()[:, None] / size[:, None, None]).flatten(0, 1)
