"""Block-diffusion decoding, as the model's config says it was trained (`Contract`).

    prefill   forward the prompt, or what of it the kind of context allows
    denoise   forward the block (known tokens and masks) seeing the context and the block, without a trace; reveal
              what the rule picks
    commit    forward the finished block as text and keep it

Where the AR head predicts first tokens of blocks, the last logits of prefill and commit give them. blocks.py has
what differs between the kinds of context.

Rows of a batch advance block by block. A row whose block is finished waits for the others (nothing in it
changes), and one that has stopped leaves the batch at the next commit.

Legend: R rows, W slots of the block, K slots looked at in a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adapt.components import samplers
from adapt.errors import Problem, UserError
from adapt.generation.base import BatchSampler, Sampler
from adapt.generation.blocks import CONTEXTS, Block, Context
from adapt.generation.checks import block_size_problems, check_layers, resolve
from adapt.generation.contract import Contract
from adapt.generation.rows import Row
from adapt.generation.rules import RULES, Step, leftmost_group
from adapt.generation.sampling import Sampling, propose


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig(Sampling):
    block_size: int | None = None
    """Slots denoised together; null takes the model's own (`block_size` of its config). 1 is AR decoding."""
    rule: Literal["confidence", "topk", "entropy", "margin", "sequential", "random"] = "confidence"
    """What a step reveals. `confidence`: all slots above `threshold`, at least one. `topk`: the most probable ones, as
    many as `steps` asks for. One slot per step: that of the lowest `entropy`, of the widest `margin` between its two
    best tokens, the leftmost (`sequential`), or any (`random`)."""
    threshold: float | None = None
    """Probability above which the confidence rule reveals a slot; lower is faster and less exact. 1: one per
    step. null takes the model's own (`threshold` of its config), 0.9 where it has none."""
    steps: int | None = None
    """Steps a block takes at most with the rule `topk`, which needs it: each reveals slots / steps, rounded up."""
    sub_block: int | None = None
    """Slots of a group; the groups of a block are revealed from left to right, while all of the block stays visible. 4
    or 8 in a block of 32 is usual. null: the block is one group."""
    mask_token_id: int | None = None
    """Token of an unknown slot; null takes the model's own (`mask_token_id` of its config)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be 1 (AR decoding) or more; 8 to 32 is usual")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} must lie in (0, 1]; 0.9 is usual, 1 reveals one slot per step"
            )
        if self.rule == "topk" and self.steps is None:
            raise ValueError("rule=topk needs steps, the denoising steps of a block: give steps, or take confidence")
        if self.rule != "topk" and self.steps is not None:
            raise ValueError(f"steps={self.steps} means nothing to rule={self.rule}; take rule=topk, or leave it out")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be 1 (a whole block at once) or more")
        if self.sub_block is not None and self.sub_block < 1:
            raise ValueError(f"sub_block={self.sub_block} must be 1 (from left to right) or more; 4 or 8 is usual")

    def problems(self, recipe) -> Iterator[Problem]:
        """What would otherwise come to light only after training."""
        yield from block_size_problems("block_diffusion", self.block_size, recipe)


class BlockDiffusionSampler(BatchSampler):
    def __init__(self, config: BlockDiffusionConfig):
        self.config = config

    def plan(self, model: nn.Module, eos_ids) -> Contract:
        config = self.config
        plan = resolve(model, eos_ids, config.block_size, config.mask_token_id, config.threshold)
        if None not in (config.sub_block, plan.block_size) and config.sub_block > plan.block_size:
            raise UserError(
                Problem(
                    "sub_block",
                    f"{config.sub_block} slots are more than a block has ({plan.block_size}): take a divisor of it, or "
                    f"leave it out",
                )
            )
        return plan

    def decode(self, model: nn.Module, rows: list[Row], plan: Contract) -> None:
        check_layers(model, rows)
        context = CONTEXTS[plan.context_mask](model, rows, plan)
        while True:
            block = context.open(rows)
            if context.head is not None:
                self._from_head(rows, block, context.head, plan.mask_token_id)
            self._denoise(rows, block, context, plan)
            for i, row in enumerate(rows):
                row.commit(block.new_tokens(i))
            going = [i for i, r in enumerate(rows) if r.result is None]
            if not going:
                return
            rows = [rows[i] for i in going]
            context.commit(rows, block, torch.tensor(going, device=block.tokens.device))

    def _from_head(self, rows: list[Row], block: Block, logits: Tensor, mask_id: int) -> None:
        """The first slot of every block that has no text in it yet."""
        fresh = [i for i, given in enumerate(block.given) if given == 0]
        if not fresh:
            return
        uniform = None
        if self.config.temperature > 0:
            uniform = torch.stack([rows[i].uniform(1) for i in fresh]).to(logits.device)
        first = propose(logits[fresh], self.config, uniform, mask_id).tokens[:, 0]
        block.begin(fresh, first)
        for i, token in zip(fresh, first.tolist(), strict=True):
            rows[i].reveal([len(rows[i].tokens)], [token], 0)

    def _denoise(self, rows: list[Row], block: Block, context: Context, plan: Contract) -> None:
        """Reveal until no row has an open slot; a row with a settled EOS closes what is left of its block."""
        config, rule = self.config, RULES[self.config.rule]
        count = None
        if config.steps is not None:
            count = torch.tensor([-(-width // config.steps) for width in block.widths], device=block.tokens.device)
        close_after_eos(rows, block)
        step = 0
        while bool(block.open.any()):
            step += 1
            busy = block.open.any(1).tolist()
            open = leftmost_group(block.open, config.sub_block)
            slots = open.any(0).nonzero()[:, 0]  # [K]
            open = open[:, slots]
            logits = context.denoise(block, slots)
            uniform = draws(rows, block, busy, slots) if config.temperature > 0 else None
            lots = draws(rows, block, busy, slots) if config.rule == "random" else None
            candidates = propose(logits, config, uniform, plan.mask_token_id)
            reveal = rule(candidates, open, Step(plan.threshold, count, lots)) & open
            block.tokens[:, slots] = torch.where(reveal, candidates.tokens, block.tokens[:, slots])
            block.open[:, slots] &= ~reveal
            record(rows, block, busy, slots, reveal, step)
            close_after_eos(rows, block)


def draws(rows: list[Row], block: Block, busy: list[bool], slots: Tensor) -> Tensor:
    """[R, K] uniform: a row draws for its own slots, and only while it is busy: what it would draw alone."""
    drawn = torch.zeros(block.tokens.shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        if busy[i]:
            drawn[i, : block.widths[i]] = row.uniform(block.widths[i])
    return drawn.to(slots.device)[:, slots]


def record(rows: list[Row], block: Block, busy: list[bool], slots: Tensor, reveal: Tensor, step: int) -> None:
    """Tell what a step revealed; every busy row took part in its forward."""
    columns, shown, tokens = slots.tolist(), reveal.tolist(), block.tokens.tolist()
    for i, row in enumerate(rows):
        if not busy[i]:
            continue
        row.forwards += 1
        new = [c for c, r in zip(columns, shown[i], strict=True) if r]
        first = len(row.tokens) - block.given[i]
        row.reveal([first + c for c in new], [tokens[i][c] for c in new], step)


def close_after_eos(rows: list[Row], block: Block) -> None:
    """Nothing behind an EOS can matter once everything before it is revealed."""
    open, tokens = block.open.tolist(), block.tokens.tolist()
    for i, row in enumerate(rows):
        settled = next((j for j, o in enumerate(open[i]) if o), block.widths[i])
        if not row.eos.isdisjoint(tokens[i][block.given[i] : settled]):
            block.open[i] = False


@samplers.register("block_diffusion")
def block_diffusion(config: BlockDiffusionConfig) -> Sampler:
    return BlockDiffusionSampler(config)
