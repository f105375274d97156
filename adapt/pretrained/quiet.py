"""transformers' progress bars, off for a while: loading takes seconds, and logs are read later."""

from __future__ import annotations

from contextlib import contextmanager


@contextmanager
def quiet():
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
