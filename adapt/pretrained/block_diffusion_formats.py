"""Public block-diffusion checkpoints that are a stock model under another name: SDAR, Fast-dLLM v2, dLLM's A2D.

Their repositories bring modelling code because of the attention mask, which is an argument here. So no code of theirs
runs: the stock transformers class reads the same weights, and what decoding has to know becomes fields of the config
(generation/contract.py). Whatever is not one of these layouts is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt.errors import Problem, UserError
from adapt.pretrained.arch import NEEDED

WHERE = "model.base"


@dataclass(frozen=True, kw_only=True)
class Format:
    title: str
    family: str
    """model_type of the stock class with the same weights."""
    mask_token: str
    """Its name in the tokenizer, where no file declares one."""
    size_key: str
    """config.json's key for the block size."""
    released_size: Callable[[str], int | None]
    """Block size of a release by its name, for releases whose config.json does not state it. null: not a release."""
    decoding: Mapping[str, str]
    """The other fields of the contract. All three formats see whole blocks of the context, and all of their own."""


def _sdar_size(name: str) -> int | None:
    match = re.fullmatch(r"SDAR-[\d.]+B-Chat(?:-b(\d+))?", name)
    return int(match[1] or 4) if match else None


def _a2d_size(name: str) -> int | None:
    if "diffusion-mdlm" in name:
        raise UserError(
            Problem(
                WHERE,
                f"{name} is masked over whole sequences (MDLM) and has no blocks, so there is nothing block diffusion "
                "could decode; use its sibling ...-diffusion-bd3lm-...",
            )
        )
    return 32 if "-diffusion-bd3lm-" in name else None


def _a2d(family: str) -> Format:
    return Format(
        title="dLLM A2D",
        family=family,
        mask_token="<|mask|>",
        size_key="block_size",
        released_size=_a2d_size,
        decoding={"prediction": "inplace", "context_mask": "block", "block_first": "noisy"},
    )


FORMATS = {
    # JetAstra/SDAR @c2041a8, training/model/SDAR-{4B,8B}-Chat (config.json, modeling_sdar.py, weight index,
    # tokenizer_config.json) and generate.py: Qwen3, in place, mask token 151669. Older config.json on the Hub state
    # neither block size nor mask token; the README gives 4, or N for "-bN", and generate.py asks the tokenizer.
    "sdar": Format(
        title="SDAR",
        family="qwen3",
        mask_token="<|MASK|>",
        size_key="block_size",
        released_size=_sdar_size,
        decoding={"prediction": "inplace", "context_mask": "block", "block_first": "noisy"},
    ),
    # The 7B release as copied in Satgoy152/DualDiffusion @9587d1e, FastDLLM_inferencing/Fast_dLLM_v2_7B (config.json,
    # configuration.py, modeling.py, weight index, tokenizer files; the Hub itself was out of reach): Qwen2; bd_size is
    # all that config.json adds, the mask token stands in the tokenizer only, and not as its mask_token. Its sampler
    # shifts logits inside the block, and takes a block's first token from the last output of the commit before it.
    "Fast_dLLM_Qwen": Format(
        title="Fast-dLLM v2",
        family="qwen2",
        mask_token="|<MASK>|",
        size_key="bd_size",
        released_size=lambda name: None,
        decoding={"prediction": "shifted", "context_mask": "block", "block_first": "ar"},
    ),
    # ZHZisZZ/dllm @ca17675: pipelines/a2d (models, convert.py copies the base's config), utils/models.py (mask token),
    # core/samplers/bd3lm.py (right_shift_logits=False), examples/a2d/README.md (block_size=32). Block-diffusion (BD3LM)
    # and whole-sequence (MDLM) checkpoints have the same config.json; only the release's name tells.
    "a2d-llama": _a2d("llama"),
    "a2d-qwen2": _a2d("qwen2"),
    "a2d-qwen3": _a2d("qwen3"),
}

_WHOLE = "it is masked over whole sequences and has no blocks"
_EXPERTS = "a mixture of experts: routing and its balance loss are not implemented"
REFUSED = {
    "sdar_moe": _EXPERTS,
    "llada": f"{_WHOLE}, and its weights have names of their own (model.transformer.blocks...)",
    "lladamoe": _EXPERTS,
    "llada2_moe": _EXPERTS,
    "llada21_moe": _EXPERTS,
    "Dream": _WHOLE,
    "bd3lm": "a diffusion transformer of its own, not the layout of a causal language model",
    "mdlm": "a diffusion transformer of its own, not the layout of a causal language model",
}

_RELATED = re.compile(r"sdar|fast_?dllm|a2d|llada|dream|editflow", re.IGNORECASE)

_SPELLED_DIFFERENTLY = {"rope_theta", "rope_scaling", "torch_dtype", "quantization_config"}
"""Keys of config.json that the stock class takes and writes under another name, or only when they are set."""
_NOT_TAKEN = {"model_type", "architectures", "transformers_version", "_name_or_path", "use_cache"}
"""Names and leftovers of training (SDAR's use_cache=false would make plain generation quadratic)."""


def format_of(folder: Path) -> Format | None:
    """The format of a model folder; null for every other kind of checkpoint."""
    return FORMATS.get(json.loads((folder / "config.json").read_text()).get("model_type"))


def stock_config(folder: Path, raw: dict[str, Any], name: str):
    """The stock config with the contract's fields, for a checkpoint whose config.json `raw` is in one of the formats;
    null for any other. `name`: last part of the Hub id or folder."""
    from transformers import CONFIG_MAPPING

    form = FORMATS.get(raw.get("model_type"))
    if form is None:
        return None
    if absent := [key for key in NEEDED if key not in raw]:
        raise UserError(
            Problem(
                WHERE,
                f"its config.json says {form.title} (model_type {raw['model_type']!r}), but lacks {', '.join(absent)}, "
                "and another checkpoint's sizes would stand in; complete it",
            )
        )
    family = CONFIG_MAPPING[form.family]
    taken = (set(family().to_dict()) | _SPELLED_DIFFERENTLY) - _NOT_TAKEN
    config = family.from_dict({key: value for key, value in raw.items() if key in taken and value is not None})
    fields = {
        "block_size": _block_size(form, raw, name),
        "mask_token_id": _mask_token_id(form, raw, folder),
        **form.decoding,
    }
    for key, value in fields.items():
        if value is not None:
            setattr(config, key, value)
    return config


def refuse_other_diffusion(kind: str) -> None:
    """A letter for diffusion checkpoints in other layouts, which a transformers error would not explain."""
    if kind in REFUSED:
        why = f"the {kind} family is not supported: {REFUSED[kind]}"
    elif _RELATED.match(kind):
        why = f"its model_type {kind!r} is not a layout known here"
    else:
        return
    known = ", ".join(f"{kind} ({form.title})" for kind, form in FORMATS.items())
    raise UserError(Problem(WHERE, f"{why}. Diffusion checkpoints that can be read: {known}"))


def layout_problems(form: Format, model, unexpected: set[str]) -> list[Problem]:
    """What shows, once loaded, that the weights are not those of the stock class after all. `unexpected`: names in the
    files that the model has no place for."""
    stock = type(model).__name__
    if unexpected:
        names = ", ".join(sorted(unexpected)[:5])
        return [
            Problem(
                WHERE,
                f"it calls itself {form.title}, but {len(unexpected)} of its weights have no place in {stock} "
                f"({names}): without them it would be another model, so this layout is refused",
            )
        ]
    head = model.get_output_embeddings().weight
    if model.config.tie_word_embeddings and head is not model.get_input_embeddings().weight:
        return [
            Problem(
                WHERE,
                "its config.json has tie_word_embeddings=true, but its files hold an lm_head.weight that differs from "
                "model.embed_tokens.weight; write false there if the head is meant, or take lm_head.weight out",
            )
        ]
    return []


def _block_size(form: Format, raw: dict[str, Any], name: str) -> int | None:
    size = raw.get(form.size_key)
    if size is None:
        return form.released_size(name)
    if type(size) is not int or size < 1:
        raise UserError(
            Problem(WHERE, f"its config.json has {form.size_key}={size!r}; a block has at least 1 token: correct it")
        )
    return size


def _mask_token_id(form: Format, raw: dict[str, Any], folder: Path) -> int | None:
    """What config.json states, or the id its tokenizer files declare. Null where both are silent, or not at hand."""
    stated = raw.get("mask_token_id")
    token, declared = _declared(form, folder)
    if stated is not None and declared is not None and stated != declared:
        raise UserError(
            Problem(
                WHERE,
                f"its config.json has mask_token_id={stated}, but its tokenizer declares {token!r} as {declared}; with "
                "the wrong one no slot is ever seen as masked: correct one of the two files",
            )
        )
    return declared if stated is None else stated


def _declared(form: Format, folder: Path) -> tuple[str, int | None]:
    """The mask token's name and id, as the tokenizer files list it, tokenizer_config.json first: it is what the
    repositories' own samplers go by. (SDAR's added_tokens.json calls the same id <MASK>.)"""
    settings = _json(folder / "tokenizer_config.json")
    token = settings.get("mask_token") or form.mask_token
    token = token["content"] if isinstance(token, dict) else token
    lists = (
        {entry["content"]: int(id) for id, entry in settings.get("added_tokens_decoder", {}).items()},
        _json(folder / "added_tokens.json"),
        {entry["content"]: entry["id"] for entry in _json(folder / "tokenizer.json").get("added_tokens", [])},
    )
    return token, next((ids[token] for ids in lists if token in ids), None)


def _json(path: Path) -> dict[str, Any]:
    """A JSON file, or {}: which of them a folder has differs, and the tokenizer reports a damaged one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
