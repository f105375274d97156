"""Where a stock transformers class computes the same function, exports hold that class: no code has to travel along, and
servers know it (x-ecomla spec, section 8). What is changed here is proven by the comparison of logits that follows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from adapt.conversion.latent_config import stock_config


def stock_form(model: Any, target: str) -> Any:
    """`model`, or the stock model of the same function (not with the target `code`); the two share what is the same. Heads
    tied to the embedding are written out for vLLM, whose class for latent attention never ties them."""
    if is_latent(model.config) and target != "code":
        model = _latent_form(model)
    if target == "vllm" and model.config.model_type == "deepseek_v3" and model.config.tie_word_embeddings:
        model = _untied(model)
    return model


def is_latent(config: Any) -> bool:
    """Whether every layer is a latent one that DeepseekV3 can hold."""
    if set(getattr(config, "token_mixers", None) or ()) != {"latent"}:
        return False
    options = config.mixer_options["latent"]
    return options["kv_norm"] and not any(options.get(key) for key in ("q_norm", "q_bias"))


@torch.no_grad()
def _latent_form(model: Any) -> Any:
    """Queries of low rank without a norm are multiplied out, ranks padded with zeros to the largest: channels that are
    zero leave the norm's output as it was, once its gain makes up for their number."""
    from transformers import AutoModelForCausalLM

    options, layers = model.config.mixer_options["latent"], model.model.layers
    rank = max(layer.self_attn.spec.kv_rank for layer in layers)
    biases = bool(options.get("kv_bias") or options.get("o_bias"))
    sizes = options["nope_dim"], options["rope_dim"]
    config = stock_config(model.config, rank, *sizes, options["rope"], biases=biases)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    weights = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k}
    for index, layer in enumerate(layers):
        found = padded(layer.self_attn, rank, biases)
        weights |= {f"model.layers.{index}.self_attn.{n}": w.to(model.dtype) for n, w in found.items()}
    stock.load_state_dict(weights, assign=True)
    stock.tie_weights()
    with torch.device(model.device):
        stock.model.rotary_emb = type(stock.model.rotary_emb)(config)
    stock.generation_config = model.generation_config
    return stock.eval()


def padded(mixer: Any, rank: int, biases: bool) -> dict[str, Tensor]:
    """Parameters of a DeepseekV3 layer with a latent of `rank` that computes what `mixer` does."""
    spec = mixer.spec
    own, more = spec.kv_rank, rank - spec.kv_rank
    latent, key = mixer.kv_a_proj_with_mqa.weight.split([own, spec.rope_dim])
    gain = mixer.kv_a_layernorm.weight
    query = (
        mixer.q_proj.weight
        if spec.q_rank is None
        else (mixer.q_b_proj.weight.double() @ mixer.q_a_proj.weight.double())
    )
    found = {
        "q_proj.weight": query,
        "kv_a_proj_with_mqa.weight": torch.cat([latent, latent.new_zeros(more, latent.shape[1]), key]),
        "kv_a_layernorm.weight": torch.cat([gain * (own / rank) ** 0.5, gain.new_zeros(more)]),
        "kv_b_proj.weight": torch.nn.functional.pad(mixer.kv_b_proj.weight, (0, more)),
        "o_proj.weight": mixer.o_proj.weight,
    }
    if biases:
        own_bias, out = mixer.kv_a_proj_with_mqa.bias, mixer.o_proj.bias
        kept = gain.new_zeros(own + spec.rope_dim) if own_bias is None else own_bias
        found["kv_a_proj_with_mqa.bias"] = torch.cat([kept[:own], gain.new_zeros(more), kept[own:]])
        found["o_proj.bias"] = gain.new_zeros(spec.hidden_size) if out is None else out
    return found


def _untied(model: Any) -> Any:
    made = copy.copy(model)
    made._modules = dict(model._modules)
    made.config = copy.deepcopy(model.config)
    made.config.tie_word_embeddings = False
    head = torch.nn.Linear(1, 1, bias=False, device="meta")
    head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone(), requires_grad=False)
    made._modules["lm_head"] = head
    return made
