"""From `model.base` to a transformers model, its tokenizer and its config. The front door is `load.py`; `check.py`
finds every problem that can be found without weights."""

from adapt.pretrained.check import check_base, inspect_base
from adapt.pretrained.load import load_config, load_model, load_tokenizer
from adapt.pretrained.provenance import base_provenance

__all__ = ["base_provenance", "check_base", "inspect_base", "load_config", "load_model", "load_tokenizer"]
