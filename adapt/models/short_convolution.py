"""A causal depthwise convolution of a few taps over time, exact across padding, packed documents and caches.

Legend: B rows, T tokens, C channels, W taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import causal_conv
from .tokens import Tokens


class ShortConvolution(nn.Module):
    def __init__(
        self, channels: int, width: int = 4, *, others: float | None = 0.0, bias: bool = False, silu: bool = False
    ):
        """`others`: where the taps besides the token's own start, which starts at 1; None: all of them at random, as
        torch's convolutions do."""
        super().__init__()
        self.width, self.silu, self.others = width, silu, others
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    @torch.no_grad()
    def initialise(self) -> None:
        if self.others is None:
            bound = self.width**-0.5
            self.weight.uniform_(-bound, bound)
        else:
            self.weight.fill_(self.others)
            self.weight[..., -1] = 1.0
        if self.bias is not None:
            self.bias.zero_() if self.others is not None else self.bias.uniform_(-bound, bound)

    @torch.no_grad()
    def pass_through(self) -> None:
        """Change the weights so that every token is seen as it is: for measuring what the taps are worth."""
        self.weight.mul_(0)
        self.weight[..., -1].add_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, tokens: Tokens, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, C], tail [B, W - 1, C] of the tokens before (None: zeros) -> y [B, T, C], the new tail.

        y_t = sum_j w_{W-1-j} x_{t-j}, over the real tokens of t's own document; in float32 or wider.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        before = self.width - 1
        tail = x.new_zeros(x.shape[0], before, x.shape[2]) if tail is None else tail.to(x.dtype)
        whole = torch.cat([tail, x], 1)
        order = None
        if tokens.keep is not None:  # padding moves in front of everything, so that taps skip it
            kept = F.pad(tokens.keep, (before, 0), value=True)
            order = kept.to(torch.int8).argsort(dim=1, stable=True)
            whole = (whole * kept[..., None]).gather(1, order[..., None].expand_as(whole))
        segments = tokens.segments
        if segments is not None and order is not None:
            raise ValueError("rows are packed or padded in the middle, not both: padding behind a row is documents")
        y = causal_conv(whole, self.weight, self.bias, segments, silu=self.silu)
        if order is not None:  # to the places the tokens came from
            y = F.pad(y, (0, 0, before, 0)).gather(1, order.argsort(1)[..., None].expand_as(whole))[:, before:]
        return y, whole[:, whole.shape[1] - before :]
