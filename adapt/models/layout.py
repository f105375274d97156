"""Who sees whom, as per-token tensors. One place turns them into a FlexAttention BlockMask or tiles (attention.py).

Legend: B rows, T clean tokens of a row, S tokens of the row as the model sees it (T for each copy).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

CLEAN = 0
"""The stream of clean tokens; noisy copies of the same tokens are the streams 1, 2, ..."""


@dataclass(frozen=True)
class Layout:
    """Per-token description of a packed row. Nothing in it is a Python number that changes during a run, so growing
    blocks or other documents are new data, never a recompilation."""

    doc: Tensor
    """[B, S] int64 document; tokens of different documents never see each other. Padding has documents of its own."""
    pos: Tensor
    """[B, S] int64 position in the document."""
    block: Tensor
    """[B, S] int64 number of the token's block, growing along a document (clean tokens: of the same grid)."""
    stream: Tensor
    """[B, S] int8 CLEAN, or the number of a noisy copy."""
    fine: Tensor | None = None
    """[B, S] bool, noisy tokens that see what they would at block size 1: themselves and all clean tokens before."""
    clean_blocks: bool = False
    """False: clean tokens see earlier clean tokens (causal). True: the whole of their block too (block-causal)."""
    noisy_causal: bool = False
    """False: noisy tokens see their whole noisy block. True: only up to themselves."""
    window: int | None = None
    """Tokens see the last so many of their document, themselves included; None: all. Fixed for a plan, as windows are
    for a model."""

    def visible(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q sees key k in row b; the three index tensors broadcast. The only definition of the mask."""
        same_doc = self.doc[b, q] == self.doc[b, k]
        q_stream, k_stream = self.stream[b, q], self.stream[b, k]
        q_noisy, k_noisy = q_stream != CLEAN, k_stream != CLEAN
        q_pos, k_pos, q_block, k_block = self.pos[b, q], self.pos[b, k], self.block[b, q], self.block[b, k]
        if self.fine is not None:
            fine = self.fine[b, q] & q_noisy
            q_block, k_block = torch.where(fine, q_pos, q_block), torch.where(fine, k_pos, k_block)
        earlier = k_pos <= q_pos
        own_block = q_noisy & (q_stream == k_stream) & (q_block == k_block)
        if self.noisy_causal:
            own_block = own_block & earlier
        context = q_noisy & ~k_noisy & (k_block < q_block)
        clean = ~q_noisy & ~k_noisy & ((k_block <= q_block) if self.clean_blocks else earlier)
        if self.window is not None:
            same_doc = same_doc & (q_pos - k_pos < self.window)
        return same_doc & (own_block | context | clean)

    def dense(self) -> Tensor:
        """[B, S, S] bool. For tests and tiny inputs: a real run never builds it."""
        rows, length = self.doc.shape
        b = torch.arange(rows, device=self.doc.device)[:, None, None]
        i = torch.arange(length, device=self.doc.device)
        return self.visible(b, i[None, :, None], i[None, None, :])

    def to(self, device, non_blocking: bool = False) -> Layout:
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **{n: t.to(device, non_blocking=non_blocking) for n, t in tensors.items()})

    @staticmethod
    def causal(doc: Tensor, pos: Tensor) -> Layout:
        """Plain autoregressive rows of packed documents."""
        return Layout.copies(doc, pos, torch.zeros_like(doc), (CLEAN,))

    @staticmethod
    def noisy_then_clean(doc: Tensor, pos: Tensor, block: Tensor, **kind: bool) -> Layout:
        """`[noisy copy | clean copy]` of the same tokens: S = 2T. doc, pos, block: [B, T]."""
        return Layout.copies(doc, pos, block, (1, CLEAN), **kind)

    @staticmethod
    def copies(
        doc: Tensor,
        pos: Tensor,
        block: Tensor,
        streams: tuple[int, ...],
        fine: Tensor | None = None,
        **kind: bool,
    ) -> Layout:
        """Copies of the same tokens, one for each of `streams`, end to end. doc, pos, block, fine: [B, T]."""
        numbers = torch.tensor(streams, dtype=torch.int8, device=doc.device).repeat_interleave(doc.shape[1])
        repeat = (1, len(streams))
        return Layout(
            doc=doc.repeat(repeat),
            pos=pos.repeat(repeat),
            block=block.repeat(repeat),
            stream=numbers.expand(doc.shape[0], -1).contiguous(),
            fine=None if fine is None else fine.repeat(repeat),
            **kind,
        )
