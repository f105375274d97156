"""How probable a text is to a block-diffusion model: its AR stream exactly, the diffusion by its evidence lower bound.

Given the clean text, blocks are independent of each other: one forward over `[noisy | clean]` scores all of a row's
blocks at once. Legend: B rows, T clean tokens of a row, n hideable tokens of a block, m of them hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from adapt.data.batch import Batch
from adapt.generation.contract import Contract
from adapt.generation.rows import device_of
from adapt.losses.linear_cross_entropy import token_cross_entropy
from adapt.models import attention
from adapt.models.layout import CLEAN, Layout
from adapt.objectives.base import Facts, Models, Targets, flat_rows
from adapt.objectives.block_diffusion import BlockDiffusion, as_decoded
from adapt.objectives.blocks import Blocks
from adapt.objectives.masking import Mask, draw

EXACT_AT_MOST = 8
"""Hideable tokens of a block up to which all 2^n masks are gone through."""


@torch.no_grad()
def ar_nats(models: Models, batch: Batch, facts: Facts, layout: Layout | None = None) -> Tensor:
    """[B] negative log-likelihood of each row's supervised tokens, each by the output before it. `layout`: what tokens
    see, where that is not plainly those before them."""
    targets = Targets.of(batch)
    return _per_row(ar_token_nats(models, batch, targets, facts, layout), targets.row, batch)


@torch.no_grad()
def ar_token_nats(models: Models, batch: Batch, targets: Targets, facts: Facts, layout: Layout | None = None) -> Tensor:
    """[N] the same of each target."""
    student = models.student
    device, layout = device_of(student), layout or Layout.causal(batch.doc_ids, batch.position_ids)
    source = targets.row * batch.input_ids.shape[1] + targets.col - 1
    hidden = attention.hidden_states(
        student, batch.input_ids.to(device), batch.position_ids.to(device), layout.to(device), facts.attention
    )
    rows, head = flat_rows(hidden, source.to(device)), attention.head_weight(student)
    return token_cross_entropy(rows, head, targets.ids.to(device))


@torch.no_grad()
def elbo_nats(
    models: Models, batch: Batch, contract: Contract, facts: Facts, *, samples: int | None = 1, seed: int = 0
) -> Tensor:
    """[B] upper bound of each row's negative log-likelihood under block-by-block diffusion.

    `samples` draws of masks per row, stratified over its blocks; None goes through all masks of every block, with the
    integral over the masking probability in closed form: a hidden set of m out of n tokens has weight Beta(m, n-m+1).
    Tokens that the AR head gives in decoding are scored by it. Raises ValueError for exact scoring
    of blocks with more than EXACT_AT_MOST hideable tokens.
    """
    objective = BlockDiffusion(as_decoded(contract), facts)
    blocks = Blocks.of(batch, contract.block_size, objective.config.phase, 0)
    hideable, total = objective.hideable(batch, blocks), torch.zeros(batch.num_rows, dtype=torch.float64)
    # Every rank makes the same number of forwards, whatever its rows hold: a sharded model needs them in step.
    if contract.head_first:
        firsts = replace(batch, labels=torch.where(blocks.first, batch.labels, -100))
        clean = Layout.copies(
            batch.doc_ids, batch.position_ids, blocks.number, (CLEAN,), clean_blocks=contract.context_mask == "block"
        )
        total += ar_nats(models, firsts, facts, clean)
    if samples is None:
        masks = _all_masks(batch, blocks, hideable, contract)
    else:
        noise = objective.config.noise
        masks = ((draw(batch, blocks, hideable, noise, seed + i), 1 / samples) for i in range(samples))
    for mask, share in masks:
        prepared = objective.lay_out(batch, blocks, [mask], size=contract.block_size)
        nats = objective.token_nats(models, prepared.to(device_of(models.student)).inputs)
        targets = Targets.of(batch, mask.hidden)
        weights = share / mask.probability[targets.row, targets.col]
        total += _per_row(nats.cpu() * weights, targets.row, batch)
    return total


def _all_masks(batch: Batch, blocks: Blocks, hideable: Tensor, contract: Contract) -> Iterator[tuple[Mask, float]]:
    """Every way to hide tokens of a block, in all blocks at once, and the weight 1 of each."""
    most = (contract.block_size or batch.input_ids.shape[1]) - contract.head_first
    if most > EXACT_AT_MOST:
        raise ValueError(f"a block has {most} tokens to hide, 2^{most} masks; exact scoring stops at {EXACT_AT_MOST}")
    number = blocks.number - 1
    count = torch.zeros(number.shape, dtype=torch.long).scatter_add_(1, number, hideable.long())
    n = count.gather(1, number)
    order = hideable.long().cumsum(1)
    before = torch.where(blocks.first, order - hideable.long(), 0).cummax(1).values
    rank = order - before - 1  # which hideable token of its block each is, from 0
    for pattern in itertools.product([False, True], repeat=most):
        chosen = torch.tensor(pattern, dtype=torch.bool)
        hidden = hideable & chosen[rank.clamp(0, most - 1)] if most else torch.zeros_like(hideable)
        m = torch.zeros_like(count).scatter_add_(1, number, hidden.long()).gather(1, number)
        m, size = m.double(), n.double()
        beta = torch.exp(torch.lgamma(m) + torch.lgamma(size - m + 1) - torch.lgamma(size + 1))
        weight = beta * 2.0 ** (size - most)  # a shorter block meets each of its masks 2^(most - n) times
        yield Mask(hidden, torch.where(hidden, 1 / weight, 1.0)), 1.0


def _per_row(nats: Tensor, row: Tensor, batch: Batch) -> Tensor:
    return torch.zeros(batch.num_rows, dtype=torch.float64).index_add_(0, row, nats.double().cpu())
