"""The student: a pretrained decoder whose token mixer is chosen layer by layer (`config.token_mixers`).

Blocks, norms, rotary embeddings and their names are the base family's own, so a base's weights keep their places.

A mixer is a module built as `Mixer(config, layer_idx)` and standing where the attention stood (`self_attn`). It is
called with keywords:

    hidden_states [B, S, D], position_embeddings (cos, sin), position_ids [B, S],
    attention_mask       for softmax attention, as transformers makes it (None: causal),
    plan                 for packed documents, which attention.py's attention reads (None: the mask counts),
    tokens               documents and padding, for recurrences (tokens.py),
    past_key_values      a cache with `layers[layer_idx]` of the mixer's own `cache_layer` class (None: no cache),
    transfer [B, S]      weights of tokens while layers learn from the attention they replace (None otherwise),
    learning             with `transfer`: whether they learn, or are only measured

and returns (output [B, S, D], anything). Class attributes: `cache_layer`, what it keeps while decoding; `created`, the
submodule that holds what the base did not have (kept in float32); `learns`: with `transfer`, the output is the
attention's, and the second value what linear_mixer.py says of the errors, which alone has a gradient.

Legend: B rows, S tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .blocks import blocks
from .configuration_adapted import AdaptedConfig
from .gated_linear import GatedLinear
from .latent_attention import Latent
from .layout import Layout
from .mamba2 import Mamba2
from .tokens import Tokens

MIXERS: dict[str, type] = {"gated_linear": GatedLinear, "latent": Latent, "mamba2": Mamba2}
"""Besides `attention`, which is the family's own."""


@dataclass
class AdaptedOutput(BaseModelOutputWithPast):
    errors: dict[int, Tensor] | None = None
    """With `transfer`: what each layer that learns reports (linear_mixer.py)."""


class AdaptedLayer(GradientCheckpointingLayer):
    def __init__(self, config: AdaptedConfig, layer_idx: int):
        super().__init__()
        family = blocks(config.base_model_type)
        self.mixer = config.token_mixers[layer_idx]
        self.self_attn = MIXERS.get(self.mixer, family.Attention)(config, layer_idx)
        self.mlp = family.MLP(config)
        self.input_layernorm = family.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = family.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        tokens: Tokens | None = None,
        transfer: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, S, D], and with `transfer` the layer's errors, which then alone have a gradient."""
        graded = torch.is_grad_enabled()
        own = {"tokens": tokens, "transfer": transfer, "learning": graded} if self.mixer in MIXERS else {}
        with torch.set_grad_enabled(graded and transfer is None):
            mixed, errors = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **own, **kwargs)
            hidden_states = hidden_states + mixed
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        learns = transfer is not None and getattr(self.self_attn, "learns", False)
        return (hidden_states, errors) if learns else hidden_states


class AdaptedPreTrainedModel(PreTrainedModel):
    config_class = AdaptedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AdaptedLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = sorted({m.created for m in MIXERS.values() if hasattr(m, "created")})
    _can_record_outputs = {"hidden_states": AdaptedLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "initialise"):
            module.initialise()


class AdaptedModel(AdaptedPreTrainedModel):
    reads_layout = True
    """attention.py's `hidden_states` hands over the layout besides its plan."""

    def __init__(self, config: AdaptedConfig):
        super().__init__(config)
        family = blocks(config.base_model_type)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([AdaptedLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = family.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = family.RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> Cache:
        return Cache(layers=[getattr(layer.self_attn, "cache_layer", DynamicLayer)() for layer in self.layers])

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        layout: Layout | None = None,
        transfer: Tensor | None = None,
        **kwargs: Any,
    ) -> AdaptedOutput:
        """attention_mask: [B, S or more] padding mask, or a 4-D one beside a `layout`, which says who sees whom."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        tokens = self._tokens(hidden.shape[1], attention_mask, position_ids, past_key_values, layout)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden, position_ids=position_ids)
        errors = {}
        for index, layer in enumerate(self.layers):
            hidden = layer(
                hidden,
                tokens=tokens,
                transfer=transfer,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            if isinstance(hidden, tuple):
                hidden, errors[index] = hidden
        return AdaptedOutput(self.norm(hidden), past_key_values, errors=errors if transfer is not None else None)

    def _tokens(self, length, attention_mask, position_ids, past_key_values, layout) -> Tokens:
        if layout is not None:
            return Tokens.of(layout)
        if attention_mask is not None and attention_mask.ndim != 2:
            if any(hasattr(layer.self_attn, "cache_layer") for layer in self.layers):
                raise ValueError(
                    "a 4-D mask says nothing to a layer with a running state: give the padding mask [rows, tokens]"
                )
            return Tokens()
        if attention_mask is None and past_key_values is None and position_ids is not None:
            return Tokens.of_positions(position_ids)  # as transformers finds packed rows, too
        return Tokens.of_mask(attention_mask, length)


class AdaptedForCausalLM(AdaptedPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AdaptedConfig):
        super().__init__(config)
        self.model = AdaptedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` leaves the cache to `forward`, which knows what each layer keeps."""
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


def register() -> None:
    """Let transformers' Auto classes know this one, where adapt itself runs. (An export carries its own code.)"""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(AdaptedConfig.model_type, AdaptedConfig, exist_ok=True)
    AutoModelForCausalLM.register(AdaptedConfig, AdaptedForCausalLM, exist_ok=True)
