"""Block-diffusion decoding with a cache, for models with a context-causal mask and a shifted prediction
(NBDiff).

    prefill   causal forward over the prompt; the AR head gives the first token of the first block
    denoise   forward the block (known tokens and masks) seeing the cache and all of itself, drop it from the
              cache again, shift the logits right by one inside the block, reveal what the rule picks
    commit    forward the finished block causally and keep it: the cache is that of an AR model of the same
              text, and the last logits give the first token of the next block

Rows of a batch advance block by block. A row whose block is finished waits for the others (nothing in it
changes), and one that has stopped leaves the batch at the next commit.

Legend: R rows, W slots of the block, K slots looked at in a step, S tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adapt.components import samplers
from adapt.errors import Problem, UserError
from adapt.generation.base import Generation, OneRow, Sampler
from adapt.generation.rows import Padded, Row, as_mask, decoding, device_of, open_rows, visible
from adapt.generation.rules import RULES
from adapt.generation.sampling import Candidates, Sampling, propose


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig(Sampling):
    block_size: int | None = None
    """Slots denoised together; null takes the model's own (`block_size` of its config). 1 is AR decoding."""
    rule: Literal["confidence", "sequential"] = "confidence"
    """`confidence`: all slots above `threshold`, at least one. `sequential`: the leftmost, one per step."""
    threshold: float = 0.9
    """Probability above which the confidence rule reveals a slot; lower is faster and less exact. 1: one per
    step."""
    mask_token_id: int | None = None
    """Token of an unknown slot; null takes the model's own (`mask_token_id` of its config)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be 1 (AR decoding) or more; 8 to 32 is usual")
        if not 0 < self.threshold <= 1:
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


@dataclass
class Block:
    """The block all rows are in."""

    tokens: Tensor
    """[R, W] int64, the mask token where unknown."""
    open: Tensor
    """[R, W] bool, slots still to be revealed. Slots beyond a row's own width never are."""
    used: Tensor
    """[R, W] bool, slots within the row's own width."""
    positions: Tensor
    """[R, W] int64 positions in the text."""
    widths: list[int]


class BlockDiffusionSampler(OneRow):
    def __init__(self, config: BlockDiffusionConfig):
        self.config = config
        self.rule = RULES[config.rule]

    def generate_batch(self, model, prompts, *, max_new_tokens, eos_ids=(), seed=0, on_event=None) -> list[Generation]:
        block_size, mask_id = self._resolve(model, eos_ids)
        everyone = open_rows(
            model, prompts, max_new_tokens=max_new_tokens, eos_ids=eos_ids, seed=seed, on_event=on_event
        )
        rows = [r for r in everyone if r.result is None]
        check_window(model, rows)
        if rows:
            with decoding(model):
                self._decode(model, rows, block_size, mask_id)
        return [r.result for r in everyone]

    def _resolve(self, model: nn.Module, eos_ids) -> tuple[int, int]:
        """Block size and mask token, from the settings or the model; every problem at once."""
        config, problems = model.config, []
        block_size, mask_id = self.config.block_size, self.config.mask_token_id
        block_size = getattr(config, "block_size", None) if block_size is None else block_size
        mask_id = getattr(config, "mask_token_id", None) if mask_id is None else mask_id
        context = getattr(config, "max_position_embeddings", None)
        if block_size is None:
            problems.append(Problem("block_size", "the model's config does not state one; give it (8 to 32 is usual)"))
        elif context is not None and block_size > context:
            problems.append(Problem("block_size", f"{block_size} is beyond the model's context of {context:,d} tokens"))
        if mask_id is None:
            problems.append(
                Problem("mask_token_id", "the model's config does not state one: is it a block-diffusion model?")
            )
        elif not 0 <= mask_id < config.vocab_size:
            problems.append(Problem("mask_token_id", f"{mask_id} is outside the vocabulary of {config.vocab_size:,d}"))
        elif mask_id in eos_ids:
            problems.append(
                Problem("mask_token_id", f"{mask_id} is also an EOS token; decoding could never tell them apart")
            )
        attention = config._attn_implementation
        if "flash" in attention or "flex" in attention:
            problems.append(
                Problem(
                    "attention",
                    f"{attention!r} takes no mask of ours; load the model with attn_implementation='sdpa'",
                )
            )
        if problems:
            raise UserError(problems)
        return block_size, mask_id

    def _decode(self, model: nn.Module, rows: list[Row], block_size: int, mask_id: int) -> None:
        from transformers import DynamicCache

        cache = DynamicCache()
        prompt = Padded.of(rows, device_of(model))
        real, position = prompt.real, prompt.positions[:, -1] + 1  # [R, S]; [R] where each row goes on
        logits = forward(model, cache, prompt.ids, prompt.positions, prefill_mask(model, real), keep=1)
        while True:
            for row in rows:
                row.forwards += 1  # the prefill, or the commit before this block
            block = self._open_block(rows, logits, position, block_size, mask_id)
            self._denoise(model, cache, rows, block, real, mask_id)
            for i, row in enumerate(rows):
                if row.result is None:
                    row.commit(block.tokens[i, : block.widths[i]].tolist())
            going = [i for i, r in enumerate(rows) if r.result is None]
            if not going:
                return
            keep = torch.tensor(going, device=real.device)
            if len(going) < len(rows):
                cache.batch_select_indices(keep)
                rows = [rows[i] for i in going]
            # Only rows whose block is whole go on, so all of it is text.
            real, tokens, positions = real[keep], block.tokens[keep], block.positions[keep]
            seen = visible(real, tokens.shape[1], causal=True)
            logits = forward(model, cache, tokens, positions, as_mask(model, seen), keep=1)
            real = torch.cat([real, torch.ones_like(tokens, dtype=torch.bool)], 1)
            position = positions[:, -1] + 1

    def _open_block(self, rows: list[Row], logits: Tensor, position: Tensor, block_size: int, mask_id: int) -> Block:
        """logits [R, 1, V] of the last committed token; position [R] of the block's first slot."""
        device = logits.device
        uniform = None
        if self.config.temperature > 0:
            uniform = torch.stack([r.uniform(1) for r in rows]).to(device)
        first = propose(logits, self.config, uniform, mask_id).tokens
        widths = [min(block_size, r.limit - len(r.tokens)) for r in rows]
        slots = torch.arange(max(widths), device=device)
        used = slots[None] < torch.tensor(widths, device=device)[:, None]
        tokens = torch.where(slots[None] == 0, first, mask_id)
        # Unused slots repeat the last position: the model may have none beyond it.
        offset = torch.minimum(slots[None], used.sum(1, keepdim=True) - 1)
        for row, token in zip(rows, first[:, 0].tolist(), strict=True):
            row.reveal([len(row.tokens)], [token], 0)
        return Block(tokens, used & (slots > 0)[None], used, position[:, None] + offset, widths)

    def _denoise(self, model, cache, rows: list[Row], block: Block, real: Tensor, mask_id: int) -> None:
        """Reveal until no row has an open slot; a row with a settled EOS closes what is left of its block."""
        seen = as_mask(model, visible(real, block.tokens.shape[1], causal=False, used=block.used))
        self._close_after_eos(rows, block)
        step = 0
        while bool(block.open.any()):
            step += 1
            busy = block.open.any(1).tolist()
            slots = block.open.any(0).nonzero()[:, 0]  # [K]; the output before a slot predicts it
            logits = forward(model, cache, block.tokens, block.positions, seen, keep=slots - 1)
            cache.crop(-block.tokens.shape[1])
            candidates = propose(logits, self.config, self._uniform(rows, block, busy, slots), mask_id)
            reveal = self._choose(candidates, block.open[:, slots])
            block.tokens[:, slots] = torch.where(reveal, candidates.tokens, block.tokens[:, slots])
            block.open[:, slots] &= ~reveal
            self._record(rows, block, busy, slots, reveal, step)
            self._close_after_eos(rows, block)

    def _choose(self, candidates: Candidates, open: Tensor) -> Tensor:
        return self.rule(candidates, open, self.config) & open

    def _uniform(self, rows: list[Row], block: Block, busy: list[bool], slots: Tensor) -> Tensor | None:
        """[R, K]: a row draws for its own slots, and only while it is busy: what it would draw alone."""
        if self.config.temperature == 0:
            return None
        drawn = torch.zeros(block.tokens.shape, dtype=torch.float64)
        for i, row in enumerate(rows):
            if busy[i]:
                drawn[i, : block.widths[i]] = row.uniform(block.widths[i])
        return drawn.to(slots.device)[:, slots]

    def _record(self, rows, block: Block, busy: list[bool], slots: Tensor, reveal: Tensor, step: int) -> None:
        columns, shown, tokens = slots.tolist(), reveal.tolist(), block.tokens.tolist()
        for i, row in enumerate(rows):
            if not busy[i]:
                continue
            row.forwards += 1
            new = [c for c, r in zip(columns, shown[i], strict=True) if r]
            row.reveal([len(row.tokens) + c for c in new], [tokens[i][c] for c in new], step)

    def _close_after_eos(self, rows: list[Row], block: Block) -> None:
        """Nothing behind an EOS can matter once everything before it is revealed."""
        open, tokens = block.open.tolist(), block.tokens.tolist()
        for i, row in enumerate(rows):
            settled = next((j for j, o in enumerate(open[i]) if o), block.widths[i])
            if not row.eos.isdisjoint(tokens[i][:settled]):
                block.open[i] = False


def forward(model: nn.Module, cache, ids: Tensor, positions: Tensor, mask: Tensor | None, keep: int | Tensor) -> Tensor:
    """ids, positions [R, W] -> logits [R, K, V] of the last `keep` or of the given columns; the cache grows
    by W."""
    return model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits


def prefill_mask(model: nn.Module, real: Tensor) -> Tensor | None:
    """None (plain causal, the fastest kernels) unless some row is padded."""
    if bool(real.all()):
        return None
    return as_mask(model, visible(real[:, :0], real.shape[1], causal=True, used=real))


def check_window(model: nn.Module, rows: list[Row]) -> None:
    """A block sees all of its context, which a sliding window would cut, and leaves no trace before its commit."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

    layers = DynamicCache(config=model.config).layers
    if any(isinstance(layer, LinearAttentionLayer) or not isinstance(layer, DynamicLayer) for layer in layers):
        raise UserError(
            "block diffusion takes a block back from the cache after every step, and this model has layers with a "
            "running state (linear attention), which cannot be taken back: use the `ar` sampler"
        )
    window = min((layer.sliding_window for layer in layers if layer.is_sliding), default=None)
    longest = max((len(r.prompt) + r.limit for r in rows), default=0)
    if window is not None and longest > window:
        raise UserError(
            f"prompt and new tokens come to {longest:,d}, beyond the sliding window of {window:,d}, and "
            f"block diffusion decodes within the window only: ask for fewer tokens, or use the `ar` sampler"
        )


@samplers.register("block_diffusion")
def block_diffusion(config: BlockDiffusionConfig) -> Sampler:
    return BlockDiffusionSampler(config)
