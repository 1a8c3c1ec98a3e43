"""Qwen 2 MoE (arXiv:2407.10671): Qwen 2 with many small experts and one that every token is sent to, behind a gate.
Qwen 3 MoE (arXiv:2505.09388): Qwen 3 with experts, and none shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ExpertsConfig, ModelConfig
from jaxinfer.models.families.base import Family
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, llama_like_config, sources
from jaxinfer.models.families.rope_fields import rope_config

_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "num_local_experts": None,
}
QWEN2_DEFAULTS = {
    **_DEFAULTS,
    "num_key_value_heads": 16,
    "max_window_layers": 28,
    "qkv_bias": True,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
QWEN3_DEFAULTS = {
    **_DEFAULTS,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


def qwen2_config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("qwen2_moe", values, QWEN2_DEFAULTS)
    window = _window(fields)
    num_windows = 0 if window is None else fields.integer("max_window_layers", minimum=0)
    num_layers = fields.integer("num_hidden_layers")
    kinds = ["sliding_attention" if i < num_windows and i % 2 == 0 else "full_attention" for i in range(num_layers)]
    return llama_like_config(
        fields,
        windows=fields.windows(kinds, window),
        ropes=rope_config(fields),
        experts=_experts(fields, shared_ffn_dim=fields.integer("shared_expert_intermediate_size"), shared_gate=True),
        expert_width="moe_intermediate_size",
        qkv_bias=fields.flag("qkv_bias"),
    )


def qwen3_config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("qwen3_moe", values, QWEN3_DEFAULTS)
    return llama_like_config(
        fields,
        windows=_window(fields),
        ropes=rope_config(fields),
        experts=_experts(fields),
        expert_width="moe_intermediate_size",
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
        qk_norm="head",
    )


def _window(fields: Fields) -> int | None:
    return fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None


def _experts(fields: Fields, **differences: Any) -> list[ExpertsConfig | None]:
    """Every decoder_sparse_step-th layer has experts, but for the mlp_only_layers."""
    # transformers 5 writes the number of experts under the other name.
    name = "num_experts" if fields.get("num_local_experts") is None else "num_local_experts"
    num_experts, step = fields.integer(name, minimum=0), fields.integer("decoder_sparse_step")
    dense = fields.get("mlp_only_layers") or []
    num_layers = fields.integer("num_hidden_layers")
    if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
        raise fields.wrong("mlp_only_layers", "a list of layers")
    if num_experts == 0:
        return [None] * num_layers
    experts = ExpertsConfig(
        num_experts,
        fields.integer("num_experts_per_tok"),
        normalize=fields.flag("norm_topk_prob"),
        **differences,
    )
    return [None if i in dense or (i + 1) % step else experts for i in range(num_layers)]


QWEN2 = Family(("Qwen2MoeForCausalLM",), qwen2_config, sources, ignored=LLAMA_IGNORED)
QWEN3 = Family(("Qwen3MoeForCausalLM",), qwen3_config, sources, ignored=LLAMA_IGNORED)
