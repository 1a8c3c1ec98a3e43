"""Qwen 2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115): Llama with q, k, v biases and, in some models, a sliding window
in the upper layers. Qwen 3 (arXiv:2505.09388): norms on the heads of q and k in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, llama_like_config, sources
from jaxinfer.models.families.rope_fields import rope_config

QWEN2_DEFAULTS = {
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN3_DEFAULTS = {**QWEN2_DEFAULTS, "head_dim": 128, "attention_bias": False}


def qwen2_config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("qwen2", values, QWEN2_DEFAULTS)
    return llama_like_config(fields, windows=_windows(fields), ropes=rope_config(fields), qkv_bias=True)


def qwen3_config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("qwen3", values, QWEN3_DEFAULTS)
    return llama_like_config(
        fields,
        windows=_windows(fields),
        ropes=rope_config(fields),
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
        qk_norm="head",
    )


def _windows(fields: Fields) -> list[int | None]:
    """The first `max_window_layers` layers see everything; the others the window, where it is in use."""
    num_layers = fields.integer("num_hidden_layers")
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    num_full = num_layers if window is None else fields.integer("max_window_layers", minimum=0)
    kinds = ["full_attention" if i < num_full else "sliding_attention" for i in range(num_layers)]
    return fields.windows(kinds, window)


QWEN2 = Family(("Qwen2ForCausalLM",), qwen2_config, sources, ignored=LLAMA_IGNORED)
QWEN3 = Family(("Qwen3ForCausalLM",), qwen3_config, sources, ignored=LLAMA_IGNORED)
