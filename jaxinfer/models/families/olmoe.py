"""OLMoE (arXiv:2409.02060): Llama with norms over the whole of q and k, and many small experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ExpertsConfig, ModelConfig
from jaxinfer.models.families.base import Family
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, llama_like_config, sources
from jaxinfer.models.families.rope_fields import rope_config

DEFAULTS = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("olmoe", values, DEFAULTS)
    fields.refuse("clip_qkv")
    experts = ExpertsConfig(
        fields.integer("num_experts"),
        fields.integer("num_experts_per_tok"),
        normalize=fields.flag("norm_topk_prob"),
    )
    return llama_like_config(
        fields,
        ropes=rope_config(fields),
        experts=experts,
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
        qk_norm="full",
    )


FAMILY = Family(("OlmoeForCausalLM",), config, sources, ignored=LLAMA_IGNORED)
