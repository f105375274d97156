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
from adapt.errors import Problem
from adapt.generation.base import BatchSampler, Sampler
from adapt.generation.blocks import CONTEXTS, Block, Context
from adapt.generation.checks import check_layers, resolve
from adapt.generation.contract import Contract
from adapt.generation.rows import Row
from adapt.generation.rules import RULES
from adapt.generation.sampling import Sampling, propose


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig(Sampling):
    block_size: int | None = None
    """Slots denoised together; null takes the model's own (`block_size` of its config). 1 is AR decoding."""
    rule: Literal["confidence", "sequential"] = "confidence"
    """`confidence`: all slots above `threshold`, at least one. `sequential`: the leftmost, one per step."""
    threshold: float | None = None
    """Probability above which the confidence rule reveals a slot; lower is faster and less exact. 1: one per
    step. null takes the model's own (`threshold` of its config), 0.9 where it has none."""
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

    def problems(self, recipe) -> Iterator[Problem]:
        """What would otherwise come to light only after training."""
        stated = hasattr(recipe.objective.config, "block_size") or "block_size" in (recipe.model.arch or {})
        if self.block_size is None and not stated:
            yield Problem(
                "",
                f"block_diffusion needs a block size, and the objective {recipe.objective.name!r} has none: write "
                f"{{name: block_diffusion, block_size: 8}}, or decode with ar",
            )


class BlockDiffusionSampler(BatchSampler):
    def __init__(self, config: BlockDiffusionConfig):
        self.config = config

    def plan(self, model: nn.Module, eos_ids) -> Contract:
        config = self.config
        return resolve(model, eos_ids, config.block_size, config.mask_token_id, config.threshold)

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
        first = propose(logits[fresh], self.config, uniform, mask_id).tokens[:, 0].tolist()
        for i, token in zip(fresh, first, strict=True):
            block.put(i, token)
            rows[i].reveal([len(rows[i].tokens)], [token], 0)

    def _denoise(self, rows: list[Row], block: Block, context: Context, plan: Contract) -> None:
        """Reveal until no row has an open slot; a row with a settled EOS closes what is left of its block."""
        close_after_eos(rows, block)
        step = 0
        while bool(block.open.any()):
            step += 1
            busy = block.open.any(1).tolist()
            slots = block.open.any(0).nonzero()[:, 0]  # [K]
            logits = context.denoise(block, slots)
            candidates = propose(logits, self.config, self._uniform(rows, block, busy, slots), plan.mask_token_id)
            open = block.open[:, slots]
            reveal = RULES[self.config.rule](candidates, open, plan) & open
            block.tokens[:, slots] = torch.where(reveal, candidates.tokens, block.tokens[:, slots])
            block.open[:, slots] &= ~reveal
            record(rows, block, busy, slots, reveal, step)
            close_after_eos(rows, block)

    def _uniform(self, rows: list[Row], block: Block, busy: list[bool], slots: Tensor) -> Tensor | None:
        """[R, K]: a row draws for its own slots, and only while it is busy: what it would draw alone."""
        if self.config.temperature == 0:
            return None
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
