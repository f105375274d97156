"""The block all rows of a batch are in, and the three kinds of context it may be denoised in.

    causal    committed text is plainly causal (NBDiff, I-DLM): the whole prompt is prefilled, a block starts
              wherever the text ends, and the cache is that of an AR model of the same text
    block     committed text sees its whole block (BD3-LM, SDAR, dLLM, Fast-dLLM v2): blocks lie on a grid from
              the text's start, so only whole blocks of the prompt are prefilled, and its tail stands, known, in
              the first block that is denoised
    document  no block structure at all (LLaDA, Dream): everything sees everything, the masked rest of the answer
              included. Any new token changes the state of all others, so there is no cache

A context holds what the rows have committed. The sampler asks it for a block, for the logits of the block's slots
as often as it likes, and tells it the finished block.

Legend: R rows, W slots of the block, K slots looked at in a step, S tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from adapt.generation.contract import Contract
from adapt.generation.rows import Padded, Row, as_mask, device_of, visible


@dataclass
class Block:
    tokens: Tensor
    """[R, W] int64, the mask token where unknown."""
    open: Tensor
    """[R, W] bool, slots still to be revealed. Slots beyond a row's own width never are."""
    used: Tensor
    """[R, W] bool, slots within the row's own width."""
    positions: Tensor
    """[R, W] int64 positions in the text."""
    widths: list[int]
    given: list[int]
    """How many leading slots of each row were text before the block was opened."""

    @staticmethod
    def of(rows: list[Row], given: Sequence[Sequence[int]], start: Tensor, size: int, mask_id: int) -> Block:
        """Slots for the tokens each row still wants, at most `size` with the given ones. start [R] is the position
        of slot 0."""
        widths = [min(size, len(g) + r.limit - len(r.tokens)) for r, g in zip(rows, given, strict=True)]
        slots = torch.arange(max(widths))
        tokens = torch.full((len(rows), len(slots)), mask_id)
        for i, known in enumerate(given):
            tokens[i, : len(known)] = torch.tensor(known, dtype=torch.long)
        counts = [len(g) for g in given]
        used = slots < torch.tensor(widths)[:, None]
        open = used & (slots >= torch.tensor(counts)[:, None])
        # Unused slots repeat the last position: the model may have none beyond it.
        offset = torch.minimum(slots, used.sum(1, keepdim=True) - 1)
        tokens, open, used, offset = (t.to(start.device) for t in (tokens, open, used, offset))
        return Block(tokens, open, used, start[:, None] + offset, widths, counts)

    def begin(self, rows: list[int], tokens: Tensor) -> None:
        """The first slots of these rows are known after all; tokens [len(rows)]."""
        self.tokens[rows, 0], self.open[rows, 0] = tokens, False

    def new_tokens(self, row: int) -> list[int]:
        """What a finished block adds to the row's text."""
        return self.tokens[row, self.given[row] : self.widths[row]].tolist()


class Context(Protocol):
    @property
    def head(self) -> Tensor | None:
        """[R, 1, V] logits of the token after the committed text, where that is how fresh blocks begin."""

    def open(self, rows: list[Row]) -> Block:
        """The next block of every row."""

    def denoise(self, block: Block, slots: Tensor) -> Tensor:
        """[R, K, V] logits that predict the slots (columns of the block); leaves no trace."""

    def commit(self, rows: list[Row], block: Block, keep: Tensor) -> None:
        """The block is text. `rows` are those that go on, keep [len(rows)] their indices until now; theirs is all
        of the block."""


class Cached:
    """Causal and block contexts: committed text lies in a cache."""

    def __init__(self, model: nn.Module, rows: list[Row], contract: Contract):
        from transformers import DynamicCache

        self.model, self.size, self.mask_id = model, contract.block_size, contract.mask_token_id
        self.shift = int(contract.prediction == "shifted")
        self.from_head = contract.head_first
        self.noisy_causal = contract.noisy_attention == "causal"
        self.cache = DynamicCache()
        lengths = [self.whole(len(r.prompt)) for r in rows]
        prompt = Padded.of(rows, device_of(model), lengths)
        self.real = prompt.real  # [R, S]
        self.start = self.real.sum(1)  # [R] where each row goes on
        self.given = [r.prompt[n:] for r, n in zip(rows, lengths, strict=True)]
        self.last = None  # [R, 1, V] logits after the committed text
        if max(lengths) > 0:
            mask = self.prefill_mask(prompt)
            self.last = forward(model, self.cache, prompt.ids, prompt.positions, mask, keep=1)
            for row, length in zip(rows, lengths, strict=True):
                row.forwards += length > 0

    @property
    def head(self) -> Tensor | None:
        return self.last if self.from_head else None

    def whole(self, length: int) -> int:
        """How much of a prompt is prefilled."""
        raise NotImplementedError

    def prefill_mask(self, prompt: Padded) -> Tensor | None:
        raise NotImplementedError

    def clean_mask(self, width: int) -> Tensor:
        """[R, 1, W, S + W] what the tokens of a finished block see."""
        raise NotImplementedError

    def open(self, rows: list[Row]) -> Block:
        block = Block.of(rows, self.given, self.start, self.size, self.mask_id)
        seen = visible(self.real, block.tokens.shape[1], causal=self.noisy_causal, used=block.used)
        self.seen = as_mask(self.model, seen)
        return block

    def denoise(self, block: Block, slots: Tensor) -> Tensor:
        keep = slots - self.shift
        logits = forward(self.model, self.cache, block.tokens, block.positions, self.seen, keep)
        self.cache.crop(-block.tokens.shape[1])
        return logits

    def commit(self, rows: list[Row], block: Block, keep: Tensor) -> None:
        self.select(keep)
        self.last = self.extend(rows, block.tokens[keep], block.positions[keep], keep=1)
        self.real = torch.cat([self.real, torch.ones_like(block.used[keep])], 1)
        self.start = block.positions[keep, -1] + 1
        self.given = [[] for _ in rows]

    def select(self, keep: Tensor) -> None:
        """Only these rows [n] go on."""
        if len(keep) < len(self.real):
            if self.cache.get_seq_length():
                self.cache.batch_select_indices(keep)
            self.real, self.start = self.real[keep], self.start[keep]

    def extend(self, rows: list[Row], tokens: Tensor, positions: Tensor, keep: int) -> Tensor:
        """Forward finished tokens [R, W] and leave them in the cache -> logits of the last `keep` (0: all)."""
        for row in rows:
            row.forwards += 1
        mask = as_mask(self.model, self.clean_mask(tokens.shape[1]))
        return forward(self.model, self.cache, tokens, positions, mask, keep)


class Causal(Cached):
    def whole(self, length: int) -> int:
        return length

    def prefill_mask(self, prompt: Padded) -> Tensor | None:
        """None (plain causal, the fastest kernels) unless some row is padded."""
        real = prompt.real
        if bool(real.all()):
            return None
        return as_mask(self.model, visible(real[:, :0], real.shape[1], causal=True, used=real))

    def clean_mask(self, width: int) -> Tensor:
        return visible(self.real, width, causal=True)

    def settle(self, counts: Tensor) -> None:
        """Of the tokens just extended by, only the first counts [R] are text. What no row keeps leaves the cache; what
        another row keeps stays in it, hidden."""
        width, longest = self.cache.get_seq_length() - self.real.shape[1], int(counts.max())
        self.cache.crop(longest - width)
        kept = torch.arange(longest, device=counts.device) < counts[:, None]
        self.real, self.start = torch.cat([self.real, kept], 1), self.start + counts


class BlockCausal(Cached):
    def whole(self, length: int) -> int:
        return length // self.size * self.size

    def prefill_mask(self, prompt: Padded) -> Tensor:
        number = prompt.positions // self.size
        earlier = number[:, None, :] <= number[:, :, None]
        alone = torch.eye(number.shape[1], dtype=torch.bool, device=number.device)  # padding sees itself
        return as_mask(self.model, ((earlier & prompt.real[:, None, :]) | alone)[:, None])

    def clean_mask(self, width: int) -> Tensor:
        return visible(self.real, width, causal=False)


class Document:
    """Everything sees everything; each step forwards the whole text with the masked rest of the answer."""

    head = None

    def __init__(self, model: nn.Module, rows: list[Row], contract: Contract):
        self.model, self.mask_id = model, contract.mask_token_id
        self.shift = int(contract.prediction == "shifted")
        prompt = Padded.of(rows, device_of(model))
        limits = torch.tensor([r.limit for r in rows], device=prompt.ids.device)
        answer = torch.arange(int(limits.max()), device=limits.device) < limits[:, None]
        self.size = contract.block_size or answer.shape[1]  # without a block size the answer is one block
        self.ids = torch.cat([prompt.ids, torch.full_like(answer, self.mask_id, dtype=torch.long)], 1)
        real = torch.cat([prompt.real, answer], 1)
        self.positions = (real.cumsum(1) - 1).clamp_(min=0)
        causal = contract.noisy_attention == "causal"
        self.seen = as_mask(model, visible(real[:, :0], real.shape[1], causal=causal, used=real))
        self.done = prompt.ids.shape[1]  # columns of text, padding included: the same for all rows

    def open(self, rows: list[Row]) -> Block:
        given: list[list[int]] = [[] for _ in rows]
        return Block.of(rows, given, self.positions[:, self.done], self.size, self.mask_id)

    def denoise(self, block: Block, slots: Tensor) -> Tensor:
        self._write(block)
        return self.model(
            input_ids=self.ids,
            position_ids=self.positions,
            attention_mask=self.seen,
            use_cache=False,
            logits_to_keep=slots + (self.done - self.shift),
        ).logits

    def commit(self, rows: list[Row], block: Block, keep: Tensor) -> None:
        self._write(block)
        self.done += block.tokens.shape[1]
        if len(keep) < len(self.ids):
            self.ids, self.positions, self.seen = self.ids[keep], self.positions[keep], self.seen[keep]

    def _write(self, block: Block) -> None:
        self.ids[:, self.done : self.done + block.tokens.shape[1]] = block.tokens


CONTEXTS = {"causal": Causal, "block": BlockCausal, "document": Document}
"""By the `context_mask` of the model's config."""


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
