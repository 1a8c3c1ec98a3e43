"""DeepSeek V2 and V2-Lite (arXiv:2405.04434), V3 and R1 (arXiv:2412.19437): multi-head latent attention, whose cache
holds one compressed key for all heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import LatentConfig, LayerConfig, ModelConfig, RopeConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, LLAMA_NAMES, model_config
from jaxinfer.models.families.llama_like import sources as named_sources
from jaxinfer.models.families.rope_fields import rope_config

DEFAULTS = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleave": True,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
}
V3_DEFAULTS = DEFAULTS | {"max_position_embeddings": 4096, "first_k_dense_replace": 3}

NAMES = LLAMA_NAMES | {
    "attention/q_down": "self_attn.q_a_proj",
    "attention/q_norm": "self_attn.q_a_layernorm",
    "attention/kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention/kv_norm": "self_attn.kv_a_layernorm",
    "attention/k_up": "self_attn.kv_b_proj",
    "attention/v_up": "self_attn.kv_b_proj",
}


def v2_config(values: Mapping[str, Any]) -> ModelConfig:
    return _config(Fields("deepseek_v2", values, DEFAULTS))


def v3_config(values: Mapping[str, Any]) -> ModelConfig:
    return _config(Fields("deepseek_v3", values, V3_DEFAULTS))


def _config(fields: Fields) -> ModelConfig:
    num_heads, num_layers = fields.integer("num_attention_heads"), fields.integer("num_hidden_layers")
    if fields.optional_integer("num_key_value_heads") not in (None, num_heads):
        raise fields.wrong("num_key_value_heads", f"num_attention_heads={num_heads} or null")
    latent = LatentConfig(
        rank=fields.integer("kv_lora_rank"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        key_dim=fields.integer("qk_nope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
        q_rank=fields.optional_integer("q_lora_rank"),
        interleaved=fields.flag("rope_interleave"),
    )
    rope = rope_config(fields.with_values({"head_dim": latent.rope_dim}))
    if rope.scaling not in ("default", "yarn"):
        raise ValueError(f"config.json: rope_type={rope.scaling!r} must be default or yarn in a {fields.family} model")
    layer = LayerConfig(
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=latent.rank + latent.rope_dim,
        ffn_dim=fields.integer("intermediate_size"),
        rope=rope,
        latent=latent,
    )
    return model_config(
        fields,
        (layer,) * num_layers,
        attention_scale=(latent.key_dim + latent.rope_dim) ** -0.5 * _scale_of_yarn(rope),
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
    )


def _scale_of_yarn(rope: RopeConfig) -> float:
    """By how much the scores grow with the context's extension, beside what yarn does to cos and sin."""
    if rope.mscale_all_dim is None or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def sources(config: ModelConfig) -> dict[str, Source]:
    found = named_sources(config, NAMES)
    for index, layer in enumerate(config.layers):
        assert layer.latent is not None
        attention = f"model.layers.{index}.self_attn"
        if layer.latent.q_rank is not None:
            found[f"layers/{index}/attention/q/weight"] = Source(f"{attention}.q_b_proj.weight")
        key, both = layer.latent.key_dim, layer.latent.key_dim + layer.latent.value_dim
        for part, rows in (("k_up", (0, key)), ("v_up", (key, both))):
            found[f"layers/{index}/attention/{part}/weight"] = Source(f"{attention}.kv_b_proj.weight", head_rows=rows)
    return found


V2 = Family(("DeepseekV2ForCausalLM",), v2_config, sources, ignored=LLAMA_IGNORED)
# Layer 61 of the published models predicts the token after the next; it is no part of the decoder.
V3 = Family(("DeepseekV3ForCausalLM",), v3_config, sources, ignored=(*LLAMA_IGNORED, "model.layers.61.*"))
