"""Phi-3, 3.5, 4 and 4-mini (arXiv:2404.14219, arXiv:2412.08905): Llama with q, k, v in one tensor and gate, up in
another, LongRoPE, and in 4-mini a rotation of only part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, llama_like_config
from jaxinfer.models.families.llama_like import sources as named_sources
from jaxinfer.models.families.rope_fields import rope_config

DEFAULTS = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
}


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("phi3", values, DEFAULTS)
    # The first releases called LongRoPE "su", and for a while "yarn".
    rope = rope_config(fields, partial=True, renamed={"su": "longrope", "yarn": "longrope"})
    if rope.scaling not in ("default", "longrope"):
        raise ValueError(f"config.json: rope_type={rope.scaling!r} must be default or longrope in a phi3 model")
    return llama_like_config(fields, windows=fields.optional_integer("sliding_window"), ropes=rope)


def sources(config: ModelConfig) -> dict[str, Source]:
    found = named_sources(config)
    for index, layer in enumerate(config.layers):
        query, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        fused = {
            "self_attn.qkv_proj": {"attention/q": query, "attention/k": kv, "attention/v": kv},
            "mlp.gate_up_proj": {"mlp/gate": layer.ffn_dim, "mlp/up": layer.ffn_dim},
        }
        for tensor, parts in fused.items():
            start = 0
            for module, size in parts.items():
                name = f"model.layers.{index}.{tensor}.weight"
                found[f"layers/{index}/{module}/weight"] = Source(name, rows=(start, start + size))
                start += size
    return found


FAMILY = Family(("Phi3ForCausalLM",), config, sources, ignored=LLAMA_IGNORED)
