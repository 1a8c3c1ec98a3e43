"""GPT-BigCode: SantaCoder and StarCoder (arXiv:2301.03988, arXiv:2305.06161). GPT-2 with multi-query attention: learned
positions, LayerNorm, a plain feed-forward, biases throughout, q, k, v in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import llama_like_config
from jaxinfer.models.families.llama_like import sources as named_sources

DEFAULTS = {
    "activation_function": "gelu_pytorch_tanh",
    "max_position_embeddings": 1024,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "multi_query": True,
}
KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "layers": "transformer.h",
    "attention/q": "attn.c_attn",
    "attention/k": "attn.c_attn",
    "attention/v": "attn.c_attn",
    "attention/o": "attn.c_proj",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("gpt_bigcode", {KEYS.get(name, name): value for name, value in values.items()}, DEFAULTS)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    inner = fields.get("intermediate_size") if "intermediate_size" in fields else None
    derived = {
        "intermediate_size": 4 * width if inner is None else inner,
        "num_key_value_heads": 1 if fields.flag("multi_query") else heads,
        "head_dim": None,
    }
    return llama_like_config(
        fields.with_values(derived),
        ropes=None,
        norm_eps="layer_norm_epsilon",
        activation="activation_function",
        attention_scale=None if fields.flag("scale_attn_weights") else 1.0,
        norm="layer",
        norm_bias=True,
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        learned_positions=True,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    found = named_sources(config, NAMES)
    for index, layer in enumerate(config.layers):
        size, query = layer.head_dim, layer.num_heads * layer.head_dim
        for leaf in ("weight", "bias"):
            name = f"transformer.h.{index}.attn.c_attn.{leaf}"
            if layer.num_kv_heads == 1 and layer.num_heads > 1:
                parts = {"q": (0, query), "k": (query, query + size), "v": (query + size, query + 2 * size)}
                for part, rows in parts.items():
                    found[f"layers/{index}/attention/{part}/{leaf}"] = Source(name, rows=rows)
            else:  # one head after another, each with its own q, k and v
                for place, part in enumerate("qkv"):
                    rows = (place * size, (place + 1) * size)
                    found[f"layers/{index}/attention/{part}/{leaf}"] = Source(name, head_rows=rows)
    return found


FAMILY = Family(
    ("GPTBigCodeForCausalLM",),
    config,
    sources,
    ignored=("lm_head.weight", "*.attn.bias", "*.attn.masked_bias"),
)
