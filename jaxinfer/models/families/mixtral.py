"""Mixtral (arXiv:2401.04088): Mistral with eight experts in every layer, two for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ExpertsConfig, ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, LLAMA_NAMES, llama_like_config
from jaxinfer.models.families.llama_like import sources as named_sources
from jaxinfer.models.families.rope_fields import rope_config

DEFAULTS = {
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
NAMES = LLAMA_NAMES | {
    "mlp/router": "block_sparse_moe.gate",
    "mlp/experts/gate": "block_sparse_moe.experts.*.w1",
    "mlp/experts/up": "block_sparse_moe.experts.*.w3",
    "mlp/experts/down": "block_sparse_moe.experts.*.w2",
}


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("mixtral", values, DEFAULTS)
    experts = ExpertsConfig(fields.integer("num_local_experts"), fields.integer("num_experts_per_tok"), normalize=True)
    return llama_like_config(
        fields,
        windows=fields.optional_integer("sliding_window"),
        ropes=rope_config(fields, default_theta=1e6),
        experts=experts,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    return named_sources(config, NAMES)


FAMILY = Family(("MixtralForCausalLM",), config, sources, ignored=LLAMA_IGNORED)
