"""Where prepared data lies between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(configured: str | None) -> Path:
    """`data.cache` of the recipe, else `$ADAPT_CACHE`, else `~/.cache/adapt`."""
    return Path(configured or os.environ.get("ADAPT_CACHE") or "~/.cache/adapt").expanduser()
