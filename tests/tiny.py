"""Tiny real models and a tiny real tokenizer: seconds on a CPU, the same classes as the large ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

TEXT = """The quick brown fox jumps over the lazy dog. A model that has read a lot still has to learn the new domain.
def add(a, b): return a + b  # numbers 0 1 2 3 4 5 6 7 8 9
Documents are packed one after the other, and none of them sees another. Blocks grow from one token to many.
"""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@cache
def tiny_tokenizer(vocab: int = 320):
    """Byte-level BPE with `<|endoftext|>` (0, eos and pad-free), chat markers and a spare `<reserved_0>` token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reserved_0>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(family: str = "llama", **over):
    from transformers import AutoConfig

    fields = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family in ("llama", "qwen3"),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 2,
        "sliding_window": None,
    } | over
    return AutoConfig.for_model(family, **fields)


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **over):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **over), dtype=dtype)
    with torch.no_grad():  # the default init is nearly uniform over the vocabulary; sharper models test more
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3 if "embed" in name or "lm_head" in name else 0.2)
    return model.eval()


def save_tiny(folder: Path, family: str = "llama", **over) -> Path:
    """A model folder as a user would have it: config, safetensors, tokenizer."""
    tiny_model(family, **over).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
