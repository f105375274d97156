"""What a recurrent mixer has to know of its tokens: where documents begin, and which tokens are padding.

Legend: B rows, S tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout


@dataclass(frozen=True)
class Tokens:
    segments: Tensor | None = None
    """[B, S] int64 number of the run of tokens a token belongs to, growing along a row: states and convolutions start
    afresh with each. None: a row is one run, which goes on from the state that is given."""
    starts: Tensor | None = None
    """[documents + 1] int32 where runs begin in the rows laid end to end, and their end: for kernels on GPUs, which take
    packed documents so. Found once for all layers."""
    keep: Tensor | None = None
    """[B, S] bool, False for padding (anywhere in a row): it neither writes, nor counts, nor decays. None: none."""

    @staticmethod
    def of(layout: Layout) -> Tokens:
        """Documents and streams of a packed row. What the layout says of blocks is for attention alone: a recurrence
        runs from left to right."""
        key = torch.stack([layout.doc, layout.stream.to(layout.doc.dtype)])
        changed = (key[:, :, 1:] != key[:, :, :-1]).any(0)
        segments = _runs(changed)
        return Tokens(segments, _starts(changed) if segments.is_cuda else None)

    @staticmethod
    def of_mask(attention_mask: Tensor | None, length: int) -> Tokens:
        """A padding mask [B, at least S] as transformers has it; its last `length` columns are these tokens."""
        if attention_mask is None:
            return Tokens()
        keep = attention_mask[:, -length:].bool()
        return Tokens(keep=None if bool(keep.all()) else keep)

    @staticmethod
    def of_positions(position_ids: Tensor) -> Tokens:
        """Rows packed without a mask: a document starts where positions [B, S] do not go on."""
        changed = position_ids[:, 1:] != position_ids[:, :-1] + 1
        return Tokens(segments=_runs(changed)) if bool(changed.any()) else Tokens()


def _runs(changed: Tensor) -> Tensor:
    """[B, S - 1] bool, whether a token starts another run than the one before -> [B, S] number of its run."""
    return torch.nn.functional.pad(changed.long(), (1, 0)).cumsum(1)


def _starts(changed: Tensor) -> Tensor:
    first = torch.nn.functional.pad(changed, (1, 0), value=True).flatten()
    return torch.cat([first.nonzero()[:, 0], first.new_tensor([len(first)], dtype=torch.long)]).int()
