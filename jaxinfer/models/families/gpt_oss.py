"""gpt-oss (arXiv:2508.10925): experts with biases and a clamped gate, packed as MXFP4; attention sinks, a sliding
window in every other layer, YaRN."""

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
    "head_dim": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "quantization_config": None,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
NAMES = LLAMA_NAMES | {"mlp/router": "mlp.router"}


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("gpt_oss", values, DEFAULTS)
    packing = fields.section("quantization_config")
    if packing and packing.get("quant_method") != "mxfp4":
        raise fields.wrong("quantization_config", "absent, or of quant_method 'mxfp4',")
    num_layers = fields.integer("num_hidden_layers")
    kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
    experts = ExpertsConfig(
        fields.integer("num_local_experts"),
        fields.integer("num_experts_per_tok"),
        scoring="softmax_of_chosen",
        bias=True,
        router_bias=True,
        clamp=(fields.number("swiglu_alpha"), fields.number("swiglu_limit")),
    )
    return llama_like_config(
        fields,
        windows=fields.windows(kinds, fields.optional_integer("sliding_window")),
        ropes=rope_config(fields, default_theta=150_000.0),
        experts=experts,
        attention_sinks=True,
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    found = {path: source for path, source in named_sources(config, NAMES).items() if "/experts/" not in path}
    for index in range(len(config.layers)):
        ours, theirs = f"layers/{index}/mlp/experts", f"model.layers.{index}.mlp.experts"
        for place, part in enumerate(("gate", "up")):  # their outputs take turns
            every = (place, 2)
            found[f"{ours}/{part}/weight"] = Source(f"{theirs}.gate_up_proj", every=every, stacked=True)
            found[f"{ours}/{part}/bias"] = Source(f"{theirs}.gate_up_proj_bias", every=every, stacked=True)
        found[f"{ours}/down/weight"] = Source(f"{theirs}.down_proj", stacked=True)
        found[f"{ours}/down/bias"] = Source(f"{theirs}.down_proj_bias")
    return found


FAMILY = Family(("GptOssForCausalLM",), config, sources, ignored=LLAMA_IGNORED)
