"""Who sees whom, as per-token tensors. One place turns them into a FlexAttention BlockMask or tiles (attention.py).

Legend: B rows, S tokens of the row as the model sees it (T, or 2T with a noisy copy in front).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CLEAN, NOISY = 0, 1


@dataclass(frozen=True)
class Layout:
    """Per-token description of a packed row. Nothing in it is a Python number that changes during a run, so growing
    blocks or other documents are new data, never a recompilation."""

    doc: Tensor
    """[B, S] int64 document; tokens of different documents never see each other. Padding has documents of its own."""
    pos: Tensor
    """[B, S] int64 position in the document."""
    block: Tensor
    """[B, S] int64 block in the document (clean tokens: of the same grid)."""
    stream: Tensor
    """[B, S] int8 CLEAN or NOISY."""
    clean_blocks: bool = False
    """False: clean tokens see earlier clean tokens (causal). True: the whole of their block too (block-causal)."""
    noisy_causal: bool = False
    """False: noisy tokens see their whole noisy block. True: only up to themselves."""

    def visible(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q sees key k in row b; the three index tensors broadcast. The only definition of the mask."""
        same_doc = self.doc[b, q] == self.doc[b, k]
        q_noisy, k_noisy = self.stream[b, q] == NOISY, self.stream[b, k] == NOISY
        q_block, k_block = self.block[b, q], self.block[b, k]
        earlier = self.pos[b, k] <= self.pos[b, q]
        own_block = q_noisy & k_noisy & (q_block == k_block)
        if self.noisy_causal:
            own_block = own_block & earlier
        context = q_noisy & ~k_noisy & (k_block < q_block)
        clean = ~q_noisy & ~k_noisy & ((k_block <= q_block) if self.clean_blocks else earlier)
        return same_doc & (own_block | context | clean)

    def dense(self) -> Tensor:
        """[B, S, S] bool. For tests and tiny inputs: a real run never builds it."""
        rows, length = self.doc.shape
        b = torch.arange(rows, device=self.doc.device)[:, None, None]
        i = torch.arange(length, device=self.doc.device)
        return self.visible(b, i[None, :, None], i[None, None, :])

    def to(self, device, non_blocking: bool = False) -> Layout:
        move = {
            n: getattr(self, n).to(device, non_blocking=non_blocking)
            for n in ("doc", "pos", "block", "stream")
        }
        return replace(self, **move)

    @staticmethod
    def causal(doc: Tensor, pos: Tensor) -> Layout:
        """Plain autoregressive rows of packed documents."""
        zero = torch.zeros_like(doc)
        return Layout(doc=doc, pos=pos, block=zero, stream=zero.to(torch.int8))

    @staticmethod
    def noisy_then_clean(doc: Tensor, pos: Tensor, block: Tensor, **kind: bool) -> Layout:
        """`[noisy copy | clean copy]` of the same tokens: S = 2T. doc, pos, block: [B, T]."""
        stream = torch.zeros_like(doc, dtype=torch.int8)
        return Layout(
            doc=torch.cat([doc, doc], 1),
            pos=torch.cat([pos, pos], 1),
            block=torch.cat([block, block], 1),
            stream=torch.cat([torch.full_like(stream, NOISY), stream], 1),
            **kind,
        )
