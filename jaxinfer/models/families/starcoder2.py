"""StarCoder2 (arXiv:2402.19173): Llama's attention with biases, LayerNorm, a plain feed-forward, a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, LLAMA_NAMES, llama_like_config
from jaxinfer.models.families.llama_like import sources as named_sources
from jaxinfer.models.families.rope_fields import rope_config

DEFAULTS = {
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "use_bias": True,
    "sliding_window": None,
}
NAMES = LLAMA_NAMES | {"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("starcoder2", values, DEFAULTS)
    bias = fields.flag("use_bias")
    return llama_like_config(
        fields,
        windows=fields.optional_integer("sliding_window"),
        ropes=rope_config(fields),
        norm_eps="norm_epsilon",
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    return named_sources(config, NAMES)


FAMILY = Family(("Starcoder2ForCausalLM",), config, sources, ignored=LLAMA_IGNORED)
