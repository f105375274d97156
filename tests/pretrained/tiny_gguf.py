"""A tiny model as a GGUF file, the way llama.cpp's converter writes it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf

from tests import tiny

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path: Path, model, *, family: str | None = None, pre: str = "smollm", quantise=None, drop=()) -> Path:
    config, tokenizer = model.config, tiny.tiny_tokenizer()
    family = family or config.model_type
    out = gguf.GGUFWriter(str(path), family)
    out.add_name("tiny")
    out.add_license("apache-2.0")
    out.add_context_length(config.max_position_embeddings)
    out.add_block_count(config.num_hidden_layers)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim if hasattr(config, "head_dim") else config.hidden_size // 4)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    specials = set(tokenizer.all_special_tokens) | {"<reserved_0>"}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([3 if t in specials else 1 for t in tokens])
    out.add_token_merges([" ".join(m) for m in raw["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    out.add_pad_token_id(2)
    out.add_chat_template(tokenizer.chat_template)
    for name, weight in model.state_dict().items():
        if name in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        data = weight.float().numpy()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            shape = data.shape  # llama.cpp rotates interleaved pairs where transformers rotates halves
            data = data.reshape(heads, 2, shape[0] // heads // 2, shape[1]).swapaxes(1, 2).reshape(shape)
        kind = None
        if quantise is not None and data.ndim == 2:
            kind, data = quantise, gguf.quants.quantize(data, quantise)
        out.add_tensor(_name(name), data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def without_architecture(path: Path) -> Path:
    """The metadata key under another name of the same length."""
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architectura", 1))
    return path


def _name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{leaf}"
    return f"{NAMES[stem]}.{leaf}"
