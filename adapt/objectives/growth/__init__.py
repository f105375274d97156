"""How the block size grows during training: pure functions of the optimizer step."""

from __future__ import annotations

from typing import Protocol


class BlockSizes(Protocol):
    """Built by `registry entry(config, target)`; `target` is the block size decoding will use."""

    def at(self, step: int) -> int:
        """Block size of this optimizer step, counted within the stage; never beyond the largest."""

    def largest_step(self) -> int:
        """A step at which blocks are as large as they get."""
