"""Mistral 7B and Nemo (arXiv:2310.06825): Llama with a sliding window in every layer, or (v0.2 on) in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, llama_like_config, sources
from jaxinfer.models.families.rope_fields import rope_config

DEFAULTS = {
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("mistral", values, DEFAULTS)
    # transformers applies the window to every layer whatever layer_types says; a mixed model would come out wrong.
    if len(set(fields.layer_kinds(["full_attention"] * fields.integer("num_hidden_layers")))) > 1:
        raise fields.wrong("layer_types", "the same for all layers")
    return llama_like_config(fields, windows=fields.optional_integer("sliding_window"), ropes=rope_config(fields))


FAMILY = Family(("MistralForCausalLM",), config, sources, ignored=LLAMA_IGNORED)
