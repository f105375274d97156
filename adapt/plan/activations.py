"""What autograd keeps of a token between forward and backward, in bytes, layer by layer.

Read off the modules and checked against torch's memory tracker (tests/plan/test_memory.py). c is the size of an element
in the compute dtype; norms compute in float32. A linear layer keeps its input for its weight's gradient alone, and what
several of them read is kept once.

Legend: D hidden size, I width of the MLP, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable

from adapt.plan.model import Group, PlannedModel
from adapt.plan.shapes import Weight, latent_sizes

Learns = Callable[[str], bool]
"""Whether a gradient of any weight of the module (of its adapters, too) is wanted, by its name in the layer."""


def layer_bytes(model: PlannedModel, group: Group, c: int, *, tiled: bool) -> float:
    """Kept of one token by one layer; `tiled`: attention in tiles (CPU), whose outputs are put together in a copy."""
    if model.inside == "created":
        return _recurrence(model, group, c) if group.layer in model.backward else 0.0
    return mixer_bytes(model, group, c, tiled=tiled) + mlp_bytes(model, group, c)


def mixer_bytes(model: PlannedModel, group: Group, c: int, *, tiled: bool) -> float:
    """The part of it up to what the token mixer adds to the hidden state."""
    s, mixer, learns = model.dims, model.mixers[group.layer], _learning(model, group)
    read = any(map(learns, ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")))
    total = norm_bytes(s.D, c, learns("input_layernorm"), read)
    if mixer == "latent":
        total += _latent(model, group.layer, c, learns, tiled)
    elif mixer == "attention":
        total += _attention(model, c, learns, tiled)
    else:
        total += _recurrence(model, group, c)
    return total + _adapters(group, c)


def mlp_bytes(model: PlannedModel, group: Group, c: int) -> float:
    s, learns = model.dims, _learning(model, group)
    total = norm_bytes(s.D, c, learns("post_attention_layernorm"), learns("gate_proj") or learns("up_proj"))
    return total + 3 * c * s.I + (c * s.I if learns("down_proj") else 0)  # gate, silu(gate), up; their product


def _learning(model: PlannedModel, group: Group) -> Learns:
    names = [w.name for w in group.weights if model.learns(w)]
    return lambda module: any(f".{module}." in name for name in names)


def norm_bytes(size: int, c: int, scaled: bool, read: bool) -> float:
    """An RMSNorm: its input in float32; what it is divided into, for the scale; its output, for linears that learn."""
    return size * (4 + (c if scaled else 0) + (c if read else 0))


def _attention(model: PlannedModel, c: int, learns: Learns, tiled: bool) -> float:
    s = model.dims
    heads = s.H + 2 * s.G
    total = c * heads * s.d + 4 * s.H  # queries, keys, values; a number for each query
    if any(".q_norm." in w.name for w in model.layers[0].weights):
        total += norm_bytes((s.H + s.G) * s.d, c, learns("q_norm"), False)
    return total + _output(s.H * s.d, c, learns, tiled)


def _output(size: int, c: int, learns: Learns, tiled: bool) -> float:
    return c * size * (2 if tiled and learns("o_proj") else 1)


def _latent(model: PlannedModel, layer: int, c: int, learns: Learns, tiled: bool) -> float:
    s, o = model.dims, latent_sizes(model.config, layer)
    key, value = s.H * (o["nope_dim"] + o["rope_dim"]), s.H * o["v_dim"]
    total = c * (2 * key + s.H * (o["nope_dim"] + o["v_dim"])) + 4 * s.H  # queries, keys; keys and values as expanded
    if o["q_rank"] is not None:
        total += norm_bytes(o["q_rank"], c, True, True) if o["q_norm"] else c * o["q_rank"]
    if o["kv_norm"]:
        total += norm_bytes(o["kv_rank"], c, learns("kv_a_layernorm"), learns("kv_b_proj"))
    else:
        total += c * (o["kv_rank"] + o["rope_dim"])
    return total + _output(value, c, learns, tiled)


SAVED_BY_RECURRENCE = {"gated_linear": (17.3, 28.5), "mamba2": (14.0, 19.0)}
"""Float32 numbers for each of the H d channels of a token that the torch forms keep while their own weights are frozen, and
while they learn. Measured with torch's tracker, not read off; CUDA packages keep less."""


def _recurrence(model: PlannedModel, group: Group, c: int) -> float:
    s, mixer = model.dims, model.mixers[group.layer]
    options = (model.config.mixer_options or {}).get(mixer, {})
    scores = 2 * 4 * s.H * options.get("chunk", 64)  # of a token with those of its chunk
    learns = any(w.created and model.learns(w) for w in group.weights)
    return 4 * SAVED_BY_RECURRENCE[mixer][learns] * s.H * s.d + scores + c * (s.H + 2 * s.G) * s.d


def selective_bytes(model: PlannedModel, group: Group, c: int) -> float:
    """What `activation_checkpointing: selective` keeps of one token in one layer besides its input: what attention returns,
    and every second product with a weight, in their order (adapt.train.recompute). Recurrences are counted whole."""
    s, mixer = model.dims, model.mixers[group.layer]
    total = c * sum(w.shape[0] for w in kept_products(group))
    if mixer == "latent":
        return total + c * s.H * latent_sizes(model.config, group.layer)["v_dim"] + 4 * s.H
    return total + (c * s.H * s.d + 4 * s.H if mixer == "attention" else _recurrence(model, group, c))


def kept_products(group: Group) -> list[Weight]:
    return [w for w in group.weights if w.linear][::2]


def _adapters(group: Group, c: int) -> float:
    """What lies between the two halves of each adapter."""
    return sum(c * w.shape[0] for w in group.weights if w.adapter and ".lora_A." in w.name)
