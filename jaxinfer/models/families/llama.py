"""Llama 2 and 3.x (arXiv:2307.09288, arXiv:2407.21783), and the many models published in their shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, llama_like_config, sources
from jaxinfer.models.families.rope_fields import rope_config

DEFAULTS = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("llama", values, DEFAULTS)
    return llama_like_config(
        fields,
        ropes=rope_config(fields),
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
    )


FAMILY = Family(("LlamaForCausalLM",), config, sources, ignored=LLAMA_IGNORED)
