"""SmolLM3: Llama without rotary embedding in every fourth layer (arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, llama_like_config, sources
from jaxinfer.models.families.rope_fields import rope_config

DEFAULTS = {
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
}


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("smollm3", values, DEFAULTS)
    rotated = _rotated(fields)
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    slides = ["full_attention" if has_rope or window is None else "sliding_attention" for has_rope in rotated]
    rope = rope_config(fields, default_theta=2_000_000.0)
    return llama_like_config(
        fields,
        windows=fields.windows(slides, window),
        ropes=[rope if has_rope else None for has_rope in rotated],
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
    )


def _rotated(fields: Fields) -> list[bool]:
    """Which layers have rotary embedding: despite its name, `no_rope_layers` holds 1 for those that do."""
    num_layers = fields.integer("num_hidden_layers")
    listed = fields.get("no_rope_layers")
    if listed is None:
        interval = fields.integer("no_rope_layer_interval")
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    if not isinstance(listed, list) or len(listed) < num_layers or not all(item in (0, 1) for item in listed):
        raise fields.wrong("no_rope_layers", f"a list of {num_layers} (num_hidden_layers) zeros and ones")
    return [item == 1 for item in listed[:num_layers]]


FAMILY = Family(("SmolLM3ForCausalLM",), config, sources, ignored=LLAMA_IGNORED)
