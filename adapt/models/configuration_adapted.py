"""The config of a decoder whose token mixer is chosen layer by layer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

LAYER_TYPES = {
    "attention": "full_attention",
    "latent": "full_attention",
    "gated_linear": "linear_attention",
    "mamba2": "linear_attention",
}
"""What transformers calls a layer with this mixer."""
OWN = ("model_type", "architectures", "auto_map", "transformers_version", "layer_types", "_name_or_path")


class AdaptedConfig(PreTrainedConfig):
    """The base's config, field for field, and three more. Raises ValueError for a layer map that cannot be.

    base_model_type: the family the blocks are of (`llama`, `mistral`, `qwen2`, `qwen3`).
    token_mixers: one name for each layer (see `MIXERS` in modeling_adapted.py).
    mixer_options: settings of the mixers by name: `{"gated_linear": {"gate": "channel", ...}}`.
    """

    model_type = "adapted"
    keys_to_ignore_at_inference = ["past_key_values"]

    base_model_type: str = "llama"
    token_mixers: list[str] | None = None
    mixer_options: dict | None = None

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.token_mixers = list(self.token_mixers or ["attention"] * self.num_hidden_layers)
        self.mixer_options = dict(self.mixer_options or {})
        if unknown := sorted({*self.token_mixers, *self.mixer_options} - LAYER_TYPES.keys()):
            raise ValueError(f"no token mixer is called {unknown[0]!r}; known are {', '.join(LAYER_TYPES)}")
        if len(self.token_mixers) != self.num_hidden_layers:
            raise ValueError(
                f"token_mixers names {len(self.token_mixers)} layers, but num_hidden_layers={self.num_hidden_layers}"
            )
        self.layer_types = [LAYER_TYPES[name] for name in self.token_mixers]
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, base: Any, mixers: dict[int, str], options: dict[str, dict]) -> AdaptedConfig:
        """The config of `base` (a family's own, or another adapted one) with other mixers in some layers."""
        fields = {k: v for k, v in base.to_dict().items() if k not in OWN}
        if base.model_type != cls.model_type:
            fields |= {"base_model_type": base.model_type, "token_mixers": ["attention"] * base.num_hidden_layers}
        fields["token_mixers"] = [mixers.get(i, name) for i, name in enumerate(fields["token_mixers"])]
        fields["mixer_options"] = {**(fields.get("mixer_options") or {}), **options}
        return cls(**fields)
