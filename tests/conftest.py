from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import tiny


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests are small: more threads only make them wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a tiny Llama with its tokenizer."""
    return tiny.save_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("ADAPT_CACHE", str(tmp_path_factory.getbasetemp() / "adapt-cache"))
