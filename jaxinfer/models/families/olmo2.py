"""OLMo 2 (arXiv:2501.00656): Llama with norms after attention and feed-forward in place of before, and over the whole
of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, LLAMA_NAMES, POST_NORM_NAMES, llama_like_config
from jaxinfer.models.families.llama_like import sources as named_sources
from jaxinfer.models.families.rope_fields import rope_config

DEFAULTS = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
NAMES = LLAMA_NAMES | POST_NORM_NAMES


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("olmo2", values, DEFAULTS)
    return llama_like_config(
        fields,
        ropes=rope_config(fields),
        norm_placement="post",
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
        qk_norm="full",
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    return named_sources(config, NAMES)


FAMILY = Family(("Olmo2ForCausalLM",), config, sources, ignored=LLAMA_IGNORED)
