"""Which bases latent attention can be made of, and the config of the student: the stock class's where that is the student
exactly, else that of the class with a mixer per layer (x-ecomla spec, section 8). No weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from adapt.conversion.latent_shape import TeacherShape
from adapt.errors import Problem
from adapt.pretrained.families import FAMILIES, family, sliding_window, unsupported

ROPE_TYPES = ("default", "llama3", "linear")
"""Those that scale each frequency for itself, so that a choice of frequencies keeps its scaling."""

YARN = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
"""As the authors' training scripts set it."""

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)


@dataclass(frozen=True)
class Layout:
    """What becomes of the base."""

    layers: tuple[int, ...]
    """Those converted."""
    kv_ranks: tuple[int, ...]
    """Of each of `layers`."""
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    rope: dict[str, Any]
    """`rope_parameters` over the student's d_r dimensions."""
    kv_norm: bool
    biases: bool
    ballast: bool = False
    """A channel of each latent is a constant, by a bias."""
    free_ranks: bool = False
    """Ranks follow from the weights: those here are the most they can be."""

    def foreign(self, num_layers: int) -> str:
        """Why this is not a DeepseekV3; empty where it is one."""
        if len(self.layers) < num_layers:
            return "layers that keep their attention"
        if not self.kv_norm:
            return "latents without a norm"
        if self.biases:
            return "biases of the queries"
        if self.q_rank is not None:
            return "queries of low rank without a norm"
        if self.free_ranks or len(set(self.kv_ranks)) > 1:
            return "ranks that differ from layer to layer"
        return ""


def student_config(config: Any, layout: Layout) -> Any:
    """The config of the student, as a new object; `config` is the base's."""
    if not layout.foreign(config.num_hidden_layers) and config.model_type != "adapted":
        return stock_config(
            config, layout.kv_ranks[0], layout.nope_dim, layout.rope_dim, layout.rope, biases=layout.ballast
        )
    from adapt.conversion.layer_map import register_student
    from adapt.models.configuration_adapted import AdaptedConfig

    register_student()
    ranks = dict(zip(layout.layers, layout.kv_ranks, strict=True))
    shape = TeacherShape.of(config)
    options = {
        "kv_rank": [ranks.get(i) for i in range(config.num_hidden_layers)],
        "q_rank": layout.q_rank,
        "nope_dim": layout.nope_dim,
        "rope_dim": layout.rope_dim,
        "v_dim": shape.head_dim,
        "rope": layout.rope,
        "kv_norm": layout.kv_norm,
        "q_bias": layout.biases,
        "kv_bias": layout.biases or layout.ballast,
        "o_bias": layout.biases or layout.ballast,
    }
    return AdaptedConfig.of(config, dict.fromkeys(layout.layers, "latent"), {"latent": options})


def told(config: Any, layout: Layout, target: str) -> str:
    """What the user hears of ranks that follow from the weights; `target`: of the export."""
    teacher, ranks = TeacherShape.of(config), layout.kv_ranks
    shapes: dict[int, int] = dict(zip(layout.layers, (r + layout.rope_dim for r in ranks), strict=True))
    whole = config.num_hidden_layers * teacher.cache
    numbers = sum(shapes.get(i, teacher.cache) for i in range(config.num_hidden_layers))
    text = f"latents of {', '.join(map(str, ranks))}: {numbers:,} numbers of cache per token, {numbers / whole:.1%} of the base's"
    stock = dataclasses.replace(layout, free_ranks=False, kv_ranks=ranks[:1], q_rank=None)
    if target != "code" and len(set(ranks)) > 1 and not stock.foreign(config.num_hidden_layers):
        padded = len(ranks) * (max(ranks) + layout.rope_dim)
        text += f". An export in the stock class pads all of them to {max(ranks)} ({padded / whole:.1%}); export.target: code "
        text += "keeps them"
    return text


def stock_config(
    config: Any, kv_rank: int, nope_dim: int, rope_dim: int, rope: dict[str, Any], *, biases: bool = False
) -> Any:
    """DeepseekV3Config without experts; what other conversions and objectives added to the config (a mask token) stays."""
    from transformers import AutoConfig

    theirs = config.to_dict()
    latent = {
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": None,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": TeacherShape.of(config).head_dim,
        "rope_interleave": True,
        "rope_parameters": rope,
        "attention_bias": biases,
    }
    dense = {  # the class's experts, of which no layer has any
        "first_k_dense_replace": config.num_hidden_layers,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": config.intermediate_size,
        "moe_layer_freq": 1,  # read by vLLM and SGLang
    }
    shared = {key: theirs[key] for key in SHARED if key in theirs}
    stated = shared | latent | dense
    known = {*type(config)().to_dict(), *stated, "head_dim", "auto_map", "quantization_config", "model_type"}
    extra = {k: v for k, v in theirs.items() if k not in known}
    made = AutoConfig.for_model("deepseek_v3", **stated, **extra)
    made.dtype = config.dtype
    return made


def rope_of(config: Any, how: str, rope_dim: int, yarn: int | None = None) -> dict[str, Any]:
    """The student's `rope_parameters`: the base's scaling, and the base frequency at which the i-th pair turns as the
    pair it was chosen for (theta^(-2i/d_r); `high` needs another theta). `yarn`: YaRN of that context in its place."""
    own = dict(config.rope_parameters or {"rope_type": "default"})
    theta = own.get("rope_theta", 10000.0)
    if yarn is not None:
        own = YARN | {"factor": own.get("factor"), "original_max_position_embeddings": yarn}
    return {**own, "rope_theta": theta ** (rope_dim / TeacherShape.of(config).head_dim) if how == "high" else theta}


def teacher_problems(config: Any, layers: tuple[int, ...], *, yarn: bool = False) -> list[Problem]:
    """What keeps a base from being converted. `yarn`: latent layers get YaRN with the base's factor."""
    problems = []
    if (kind := family(config)) not in FAMILIES:
        return [unsupported(kind)]
    mixers = getattr(config, "token_mixers", None) or ["attention"] * config.num_hidden_layers
    if done := [i for i in layers if mixers[i] != "attention"]:
        what = f"layer {done[0]} is {mixers[done[0]]} already; only attention layers can be converted"
        problems.append(Problem("layers", what))
    if "latent" in mixers:
        problems.append(Problem("layers", "the base has latent layers already; convert all of them at once"))
    if window := sliding_window(config):
        what = (
            f"its layers look back {window} tokens at most, and latent attention sees everything; take a base with full "
            'attention, or state it in the base\'s config.json: "sliding_window": null'
        )
        problems.append(Problem("model.base", what))
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if yarn and not (config.rope_parameters or {}).get("factor"):
        what = f"yarn takes its factor from the base's scaling, and this base has {rope} RoPE without one; leave it out"
        problems.append(Problem("rope_scaling", what))
    if rope not in ROPE_TYPES and not yarn:
        what = f"{rope} RoPE depends on all frequencies of a head together, and latent attention keeps some of them"
        problems.append(Problem("model.rope_scaling", f"{what}; use one of {', '.join(ROPE_TYPES)}"))
    return problems


def target_problems(config: Any, layout: Layout, target: str) -> list[Problem]:
    """What vLLM's class cannot express (spec 8). Low-rank queries and ranks that differ are merged and padded away by
    the export."""
    if target != "vllm":
        return []
    problems = []
    where = "export.target"
    if len(layout.layers) < config.num_hidden_layers:
        what = "vllm has no model that mixes latent attention with another; convert all layers, or set it to hf"
        problems.append(Problem(where, what))
    if not layout.kv_norm:
        what = "vllm always normalises the latent, and latent_norm: none has no norm; use calibrated, or set it to hf"
        problems.append(Problem(where, what))
    if layout.ballast:
        what = "vllm skips biases in this class without a word, and a ballast is one; set latent_norm: calibrated, or"
        problems.append(Problem(where, f"{what} set it to hf"))
    if layout.biases:
        what = "vllm skips biases in this class without a word; set biases: drop (and distil), or set it to hf"
        problems.append(Problem(where, what))
    if (kind := layout.rope.get("rope_type", "default")) not in ("default", "yarn"):
        what = f"vllm takes the base's {kind} RoPE for YaRN in this class; train with model.rope_scaling="
        problems.append(Problem(where, f"{what}{{rope_type: default}}, or with rope_scaling: yarn, or set it to hf"))
    return problems


def has_biases(config: Any) -> bool:
    return family(config) == "qwen2" or bool(getattr(config, "attention_bias", False))
