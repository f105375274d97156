"""Lossless self-speculation: block diffusion drafts, the causal pass of the same weights verifies.

    draft     denoise the rest of a block whose first token is known, in a few steps
    verify    forward the drafted block causally over the cache, which is what a commit does: its logits say what AR
              decoding would have written in each slot. The longest prefix it agrees with is text; where it disagrees,
              its own token is the first of the next block, so no pass is without a new token

Greedy, the text is that of AR decoding, token for token. Sampled, it has AR decoding's distribution, by rejection
sampling (arXiv 2211.17192): a token x drafted from q is kept with probability min(1, p(x) / q(x)), and else replaced by
one drawn from the positive part of p - q.

That is exact only if x was drawn from q given all that the test of earlier slots has used. Block diffusion as it
samples elsewhere breaks this: a token that came early, far to the right, has shaped q of slots before it, and whether
a slot is revealed at all depends on the token drawn for it. So the denoising here is greedy, hence a function of the
text so far; it leaves a distribution q for each slot, and the draft is drawn from these independently.

Rows of a batch go on in step. They keep different numbers of tokens; what one has to give back and another keeps stays
in the cache as a hole that nobody sees.

Legend: R rows, W slots of the block, K slots looked at in a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapt.components import samplers
from adapt.errors import Problem, UserError
from adapt.generation.base import BatchSampler, Sampler
from adapt.generation.blocks import Block, Causal
from adapt.generation.checks import block_size_problems, check_layers, resolve
from adapt.generation.contract import Contract
from adapt.generation.rows import Row
from adapt.generation.rules import Step, confidence
from adapt.generation.sampling import Sampling, distribution, draw, propose


@dataclass(frozen=True, kw_only=True)
class SelfSpeculationConfig(Sampling):
    block_size: int | None = None
    """Slots drafted together, the known first one included; null takes the model's own (`block_size` of its config)."""
    threshold: float | None = None
    """Probability above which a drafting step settles a slot; null takes the model's own, 0.9 where it has none. It
    decides how much is accepted, never what is written."""
    steps: int = 2
    """Denoising steps of a draft at most; the last one settles every slot left. Fewer are cheaper, more are better
    guesses."""
    mask_token_id: int | None = None
    """Token of an unknown slot; null takes the model's own (`mask_token_id` of its config)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be 1 (AR decoding) or more; 4 to 16 is usual")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must lie in (0, 1]; 0.9 is usual")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} leaves nothing to verify; give 1 or more")

    def problems(self, recipe) -> Iterator[Problem]:
        yield from block_size_problems("self_speculation", self.block_size, recipe)
        whole = getattr(recipe.objective.config, "block_size", 1) is None
        if whole or getattr(recipe.objective.config, "context", "causal") != "causal":
            yield Problem("", f"{NOT_CAUSAL}: decode with block_diffusion, or train with objective.context=causal")


NOT_CAUSAL = "self_speculation verifies with the AR pass, and a model without a causal context has none"


@dataclass
class Draft:
    block: Block
    steps: Tensor
    """[R, W] int64 denoising step that settled each slot."""
    q: Tensor | None
    """[R, W, V] what the tokens were drawn from; None at temperature 0, where nothing is drawn."""


class SelfSpeculationSampler(BatchSampler):
    def __init__(self, config: SelfSpeculationConfig):
        self.config = config

    def plan(self, model: nn.Module, eos_ids) -> Contract:
        config = self.config
        plan = resolve(model, eos_ids, config.block_size, config.mask_token_id, config.threshold)
        if plan.context_mask != "causal":
            raise UserError(f"{NOT_CAUSAL} (context_mask={plan.context_mask}): use block_diffusion")
        return plan

    def decode(self, model: nn.Module, rows: list[Row], plan: Contract) -> None:
        check_layers(model, rows)
        context = Causal(model, rows, plan)
        sampled = self.config.temperature > 0
        uniform = torch.stack([r.uniform(1) for r in rows]).to(context.last.device) if sampled else None
        first = propose(context.last, self.config, uniform, plan.mask_token_id).tokens[:, 0]
        while True:
            for row, token in zip(rows, first.tolist(), strict=True):
                if row.result is None:
                    row.reveal([len(row.tokens)], [token], 0)
                    row.commit([token])
            going = [i for i, r in enumerate(rows) if r.result is None]
            if not going:
                return
            rows, first = [rows[i] for i in going], first[going]
            context.select(torch.tensor(going, device=first.device))
            context.given = [[token] for token in first.tolist()]
            block = context.open(rows)
            uniform = self._uniform(rows, block) if sampled else None
            draft = self._draft(rows, block, context, plan, uniform)
            logits = context.extend(rows, block.tokens, block.positions, keep=0)
            if draft.q is None:
                target = propose(logits, self.config, None, plan.mask_token_id).tokens
                kept, first = agree(block.tokens, block.used, target)
            else:
                p = distribution(logits, self.config, plan.mask_token_id)
                kept, first = verify(block.tokens, block.used, p, draft.q, uniform[1])
            context.settle(kept)
            self._commit(rows, draft, kept.tolist())

    def _uniform(self, rows: list[Row], block: Block) -> Tensor:
        """[2, R, W]: for the draft, and for its verification."""
        drawn = torch.zeros(2, *block.tokens.shape, dtype=torch.float64)
        for i, row in enumerate(rows):
            drawn[:, i, : block.widths[i]] = row.uniform(2 * block.widths[i]).view(2, -1)
        return drawn.to(block.tokens.device)

    def _draft(self, rows: list[Row], block: Block, context: Causal, plan: Contract, uniform: Tensor | None) -> Draft:
        """Settle every open slot greedily, then draw from the distributions that this leaves."""
        wanted = block.open.clone()
        draft = Draft(block, torch.zeros_like(block.tokens), None)
        for step in range(1, self.config.steps + 1):
            if not bool(block.open.any()):
                break
            for row, busy in zip(rows, block.open.any(1).tolist(), strict=True):
                row.forwards += busy
            slots = block.open.any(0).nonzero()[:, 0]  # [K]
            open = block.open[:, slots]
            logits = context.denoise(block, slots)
            candidates = propose(logits, GREEDY, None, plan.mask_token_id)
            reveal = open if step == self.config.steps else confidence(candidates, open, Step(plan.threshold)) & open
            block.tokens[:, slots] = torch.where(reveal, candidates.tokens, block.tokens[:, slots])
            block.open[:, slots] &= ~reveal
            draft.steps[:, slots] = torch.where(reveal, step, draft.steps[:, slots])
            if uniform is not None:
                found = distribution(logits, self.config, plan.mask_token_id)
                if draft.q is None:
                    draft.q = found.new_zeros(*block.tokens.shape, found.shape[-1])
                draft.q[:, slots] = torch.where(reveal[..., None], found, draft.q[:, slots])
        if uniform is not None:
            if draft.q is None:  # blocks of one
                draft.q = torch.zeros(*block.tokens.shape, context.last.shape[-1], device=block.tokens.device)
            block.tokens = torch.where(wanted, draw(draft.q, uniform[0]), block.tokens)
        return draft

    def _commit(self, rows: list[Row], draft: Draft, kept: list[int]) -> None:
        """The kept drafts, without the first slot, which is text already."""
        tokens, steps = draft.block.tokens.tolist(), draft.steps.tolist()
        for i, row in enumerate(rows):
            first = len(row.tokens) - 1
            for slot in range(1, kept[i]):
                row.reveal([first + slot], [tokens[i][slot]], steps[i][slot])
            if kept[i] > 1:
                row.commit(tokens[i][1 : kept[i]])


GREEDY = Sampling()


def agree(tokens: Tensor, used: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Drafted tokens [R, W] (the first is text already), target [R, W] the AR pass's choice after each slot ->
    how many tokens are kept [R] (1 or more), and the token after them [R]."""
    same = (tokens[:, 1:] == target[:, :-1]) & used[:, 1:]
    kept = 1 + same.long().cumprod(1).sum(1)
    return kept, target.gather(1, kept[:, None] - 1)[:, 0]


def verify(tokens: Tensor, used: Tensor, p: Tensor, q: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """As `agree`, by rejection sampling. p [R, W, V] the AR distributions after each slot, q [R, W, V] those the slots
    were drawn from, uniform [R, W] fp64: of slot 0 for the token after the kept ones, of the others for their test."""
    drafted = tokens[:, 1:, None]
    p_of = p[:, :-1].double().gather(2, drafted)[..., 0]
    q_of = q[:, 1:].double().gather(2, drafted)[..., 0]
    same = (uniform[:, 1:] * q_of < p_of) & used[:, 1:]
    kept = 1 + same.long().cumprod(1).sum(1)
    rows = torch.arange(len(tokens), device=tokens.device)
    after = p[rows, kept - 1].double()  # [R, V]
    rejected = kept < used.sum(1)
    drawn_from = q[rows, kept.clamp(max=tokens.shape[1] - 1)].double()
    rest = torch.where(rejected[:, None], (after - drawn_from).clamp(min=0), after)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, after)  # p = q but for rounding
    return kept, draw(rest[:, None], uniform[:, :1])[:, 0]


@samplers.register("self_speculation")
def self_speculation(config: SelfSpeculationConfig) -> Sampler:
    return SelfSpeculationSampler(config)
