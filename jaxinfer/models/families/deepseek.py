"""DeepSeek V2 and V2-Lite (arXiv:2405.04434), V3 and R1 (arXiv:2412.19437): multi-head latent attention, whose cache
holds one compressed key for all heads, and experts in groups after some dense layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxinfer.models.config import ExpertsConfig, LatentConfig, LayerConfig, ModelConfig, RopeConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, LLAMA_NAMES, model_config
from jaxinfer.models.families.llama_like import sources as named_sources
from jaxinfer.models.families.rope_fields import rope_config

_DEFAULTS = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
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
    "moe_layer_freq": 1,
}
V2_DEFAULTS = _DEFAULTS | {
    "max_position_embeddings": 2048,
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "n_group": None,
    "topk_group": None,
}
V3_DEFAULTS = _DEFAULTS | {
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
}

NAMES = LLAMA_NAMES | {
    "attention/q_down": "self_attn.q_a_proj",
    "attention/q_norm": "self_attn.q_a_layernorm",
    "attention/kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention/kv_norm": "self_attn.kv_a_layernorm",
    "attention/k_up": "self_attn.kv_b_proj",
    "attention/v_up": "self_attn.kv_b_proj",
    "mlp/shared/gate": "mlp.shared_experts.gate_proj",
    "mlp/shared/up": "mlp.shared_experts.up_proj",
    "mlp/shared/down": "mlp.shared_experts.down_proj",
}


def v2_config(values: Mapping[str, Any]) -> ModelConfig:
    """Experts by their share of a softmax; in V2, from the groups with the best expert."""
    fields = Fields("deepseek_v2", values, V2_DEFAULTS)
    _only(fields, "scoring_func", "softmax")
    _only(fields, "norm_topk_prob", False)
    _only(fields, "topk_method", "greedy", "group_limited_greedy")
    return _config(fields, grouped=fields.get("topk_method") == "group_limited_greedy")


def v3_config(values: Mapping[str, Any]) -> ModelConfig:
    """Experts by a sigmoid, chosen with a bias that balances them, from the groups with the two best in sum."""
    fields = Fields("deepseek_v3", values, V3_DEFAULTS)
    _only(fields, "scoring_func", "sigmoid")
    _only(fields, "topk_method", "noaux_tc")
    normalize = fields.flag("norm_topk_prob")
    return _config(fields, scoring="sigmoid", score_bias=True, normalize=normalize, normalize_eps=1e-20, group_best=2)


def _only(fields: Fields, name: str, *values: Any) -> None:
    if fields.get(name) not in values:
        raise fields.wrong(name, " or ".join(map(repr, values)))


def _experts(fields: Fields, *, grouped: bool = True, **differences: Any) -> ExpertsConfig:
    groups = {}
    if grouped:
        groups = {"num_groups": fields.integer("n_group"), "num_active_groups": fields.integer("topk_group")}
    return ExpertsConfig(
        num_experts=fields.integer("n_routed_experts"),
        num_active=fields.integer("num_experts_per_tok"),
        scaling=fields.number("routed_scaling_factor"),
        shared_ffn_dim=(fields.optional_integer("n_shared_experts") or 0) * fields.integer("moe_intermediate_size"),
        **groups,
        **differences,
    )


def _config(fields: Fields, **routing: Any) -> ModelConfig:
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
    _only(fields, "moe_layer_freq", 1)
    num_dense = min(fields.integer("first_k_dense_replace", minimum=0), num_layers)
    dense = LayerConfig(
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=latent.rank + latent.rope_dim,
        ffn_dim=fields.integer("intermediate_size"),
        rope=rope,
        latent=latent,
    )
    sparse = dense
    if num_dense < num_layers:
        width = fields.integer("moe_intermediate_size")
        sparse = replace(dense, ffn_dim=width, experts=_experts(fields, **routing))
    return model_config(
        fields,
        (dense,) * num_dense + (sparse,) * (num_layers - num_dense),
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
