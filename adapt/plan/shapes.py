"""Every parameter of a student, from its config: name, shape, role. No module is built.

Legend: D hidden size, I width of the MLP, H query heads, G key/value heads, d head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from adapt.config.schema import Lora
from adapt.errors import Problem, UserError
from adapt.optim.groups import Role
from adapt.pretrained.families import FAMILIES, dense_latent, family

LEAST = 16
"""Rows and columns of a matrix, at least (adapt.optim.routing)."""


@dataclass(frozen=True)
class Weight:
    name: str
    shape: tuple[int, ...]
    role: Role
    linear: bool = False
    """The weight of a linear module, [outputs, inputs]: every token is multiplied by it."""
    created: bool = False
    """A conversion made it: it is kept in float32, and trains beside adapters."""
    adapter: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The decoder layer it is in; None for embedding, last norm and head."""
        parts = self.name.split(".")
        return int(parts[2]) if parts[:2] == ["model", "layers"] else None


@dataclass(frozen=True)
class Dims:
    """The sizes of a config by the letters above."""

    D: int
    I: int  # noqa: E741
    H: int
    G: int
    d: int
    V: int
    layers: int

    @classmethod
    def of(cls, config: Any) -> Dims:
        heads = config.num_attention_heads
        d = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            D=config.hidden_size,
            I=config.intermediate_size,
            H=heads,
            G=getattr(config, "num_key_value_heads", None) or heads,
            d=d,
            V=config.vocab_size,
            layers=config.num_hidden_layers,
        )


def mixers(config: Any) -> list[str]:
    """The token mixer of each layer."""
    if dense_latent(config):
        return ["latent"] * config.num_hidden_layers
    return list(getattr(config, "token_mixers", None) or ["attention"] * config.num_hidden_layers)


def weights_of(config: Any) -> list[Weight]:
    """All parameters of the causal LM of `config`; a tied head goes by the embedding's name, as in the model.

    Raises UserError for a model whose layers are not known here.
    """
    if family(config) not in FAMILIES and not dense_latent(config):
        what = f"a plan needs the shapes of every layer, and those of {config.model_type!r} are known to its own code alone"
        raise UserError(Problem("model.base", what))
    s = Dims.of(config)
    found = [Weight("model.embed_tokens.weight", (s.V, s.D), "embedding")]
    for index, mixer in enumerate(mixers(config)):
        at = f"model.layers.{index}"
        found += [replace(w, name=f"{at}.self_attn.{w.name}") for w in _mixer(mixer, config, s, index)]
        for name, shape in (("gate_proj", (s.I, s.D)), ("up_proj", (s.I, s.D)), ("down_proj", (s.D, s.I))):
            found += _linear(f"{at}.mlp.{name}", shape, bias=bool(getattr(config, "mlp_bias", False)))
        found += [Weight(f"{at}.{n}.weight", (s.D,), "norm") for n in ("input_layernorm", "post_attention_layernorm")]
    found.append(Weight("model.norm.weight", (s.D,), "norm"))
    if not config.tie_word_embeddings:
        found.append(Weight("lm_head.weight", (s.V, s.D), "head", linear=True))
    return found


def with_adapters(weights: list[Weight], lora: Lora | None) -> list[Weight]:
    """The same with LoRA beside every linear weight whose module one of `lora.targets` names."""
    if lora is None:
        return weights
    found: list[Weight] = []
    bases = {w.name.removesuffix(".weight") for w in weights if w.linear and _targeted(w, lora)}
    for weight in weights:
        module, _, leaf = weight.name.rpartition(".")
        if module not in bases:
            found.append(weight)
            continue
        found.append(replace(weight, name=f"{module}.base_layer.{leaf}"))
        if leaf == "weight":
            outputs, inputs = weight.shape
            for letter, shape in (("A", (lora.rank, inputs)), ("B", (outputs, lora.rank))):
                made = _linear(f"{module}.lora_{letter}.default", shape)
                found += [replace(w, adapter=True) for w in made]
    return found


def _targeted(weight: Weight, lora: Lora) -> bool:
    module = weight.name.removesuffix(".weight")
    return any(module == t or module.endswith(f".{t}") for t in lora.targets)


def _linear(name: str, shape: tuple[int, int], *, bias: bool = False) -> list[Weight]:
    role: Role = "matrix" if min(shape) >= LEAST else "other"
    found = [Weight(f"{name}.weight", shape, role, linear=True)]
    return [*found, Weight(f"{name}.bias", shape[:1], "other")] if bias else found


def _mixer(mixer: str, config: Any, s: Dims, index: int) -> list[Weight]:
    """Names without the module's own."""
    if mixer == "latent":
        return list(_latent(config, s, index))
    if mixer == "attention":
        return list(_attention(config, s))
    if mixer not in RECURRENCES:
        what = f"the shapes of the token mixer {mixer!r} are not known here; known are {', '.join(['attention', 'latent', *RECURRENCES])}"
        raise UserError(Problem("model.conversions", what))
    made = RECURRENCES[mixer](s, config.mixer_options.get(mixer, {}))
    found = [Weight(f"recurrence.{n}", shape, "other", created=True) for n, shape in made]
    return [*_attention(config, s), *found]


def _attention(config: Any, s: Dims) -> Iterator[Weight]:
    kind, asked = family(config), bool(getattr(config, "attention_bias", False))
    bias = {"llama": asked, "qwen3": asked, "qwen2": True}.get(kind, False)
    for name, heads in (("q_proj", s.H), ("k_proj", s.G), ("v_proj", s.G)):
        yield from _linear(name, (heads * s.d, s.D), bias=bias)
    yield from _linear("o_proj", (s.D, s.H * s.d), bias=bias and kind != "qwen2")
    if kind == "qwen3":
        yield from (Weight(f"{n}.weight", (s.d,), "norm") for n in ("q_norm", "k_norm"))


def latent_sizes(config: Any, index: int) -> dict[str, Any]:
    """Ranks, head dimensions, norms and biases of a latent layer, whichever class it is of."""
    if dense_latent(config):
        asked = bool(config.attention_bias)
        return {
            "kv_rank": config.kv_lora_rank, "q_rank": config.q_lora_rank, "nope_dim": config.qk_nope_head_dim,
            "rope_dim": config.qk_rope_head_dim, "v_dim": config.v_head_dim, "q_norm": True, "kv_norm": True,
            "q_a_bias": asked, "q_bias": False, "kv_bias": asked, "o_bias": asked,
        }  # fmt: skip
    options = dict(config.mixer_options["latent"])
    for key in ("kv_rank", "q_rank"):
        if isinstance(ranks := options.get(key), list | tuple):
            options[key] = ranks[index]
    defaults = {"q_rank": None, "q_norm": False, "kv_norm": True, "q_a_bias": False}
    return defaults | dict.fromkeys(("q_bias", "kv_bias", "o_bias"), False) | options


def _latent(config: Any, s: Dims, index: int) -> Iterator[Weight]:
    o = latent_sizes(config, index)
    queries = s.H * (o["nope_dim"] + o["rope_dim"])
    if o["q_rank"] is None:
        yield from _linear("q_proj", (queries, s.D), bias=o["q_bias"])
    else:
        yield from _linear("q_a_proj", (o["q_rank"], s.D), bias=o["q_a_bias"])
        if o["q_norm"]:
            yield Weight("q_a_layernorm.weight", (o["q_rank"],), "norm")
        yield from _linear("q_b_proj", (queries, o["q_rank"]), bias=o["q_bias"])
    yield from _linear("kv_a_proj_with_mqa", (o["kv_rank"] + o["rope_dim"], s.D), bias=o["kv_bias"])
    if o["kv_norm"]:
        yield Weight("kv_a_layernorm.weight", (o["kv_rank"],), "norm")
    yield from _linear("kv_b_proj", (s.H * (o["nope_dim"] + o["v_dim"]), o["kv_rank"]))
    yield from _linear("o_proj", (s.D, s.H * o["v_dim"]), bias=o["o_bias"])


def _gated_linear(s: Dims, options: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    from adapt.models.gated_linear import GatedLinearOptions

    o = GatedLinearOptions(**options)
    features = s.d // 2 if o.features is None else o.features
    decays = s.G * (s.d if o.gate == "channel" else 1)
    yield from ((f"{n}.weight", (s.H * s.d, 1, o.conv_width)) for n in ("q_conv", "k_conv"))
    yield from ((f"{n}.weight", (s.H, s.d, features)) for n in (("q_map",) if o.tied else ("q_map", "k_map")))
    if o.gate_rank is not None:
        yield "gate.down", (o.gate_rank, s.D)
    yield "gate.up", (decays, o.gate_rank or s.D)
    yield "gate.bias", (decays,)


def _mamba2(s: Dims, options: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    from adapt.models.mamba2 import Mamba2Options

    o, channels = Mamba2Options(**options), (s.H + 2 * s.G) * s.d
    yield "conv.weight", (channels, 1, o.conv_width)
    yield "conv.bias", (channels,)
    yield "z_weight", (s.H * s.d, s.D)
    yield "z_bias", (s.H * s.d,)
    yield "dt_weight", (s.H, s.D)
    yield from ((n, (s.H,)) for n in ("dt_bias", "A_log", "D"))
    if o.norm:
        yield "norm", (s.H, s.d)


RECURRENCES = {"gated_linear": _gated_linear, "mamba2": _mamba2}
