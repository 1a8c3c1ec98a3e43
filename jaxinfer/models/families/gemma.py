"""Gemma 2 (arXiv:2408.00118) and the text part of Gemma 3 (arXiv:2503.19786): layers that see a sliding window between
layers that see everything, norms on both sides of each block, scaled embeddings; Gemma 2 caps its scores and logits,
Gemma 3 norms the heads of q and k and rotates the two kinds of layer at different bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.llama_like import (
    LLAMA_IGNORED,
    LLAMA_NAMES,
    POST_NORM_NAMES,
    llama_like_config,
)
from jaxinfer.models.families.llama_like import sources as named_sources
from jaxinfer.models.families.rope_fields import read_rope, rope_config

GEMMA2_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
# The text part of a published multimodal config holds only what differs from these.
GEMMA3_DEFAULTS = {
    **GEMMA2_DEFAULTS,
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
}

NAMES = LLAMA_NAMES | POST_NORM_NAMES

# Where the text model lies in a multimodal one: in today's releases, and in the first ones.
MULTIMODAL_ALIASES = (
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
MULTIMODAL_IGNORED = (
    *LLAMA_IGNORED,
    "language_model.lm_head.weight",
    "*vision_tower.*",
    "*audio_tower.*",
    "*multi_modal_projector.*",
    "*embed_vision.*",
    "*embed_audio.*",
)


def alternating(num_layers: int, period: int) -> list[str]:
    """Every `period`-th layer sees everything, the others a window."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]


def text_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The text part of a multimodal config; whether the head is tied is decided outside it."""
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"config.json: text_config={text!r} must be an object; copy the checkpoint's own file")
    tied = values.get("tie_word_embeddings")
    return {**text, "tie_word_embeddings": True if tied is None else tied}


def gemma2_config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("gemma2", values, GEMMA2_DEFAULTS)
    kinds = alternating(fields.integer("num_hidden_layers"), 2)
    return _config(
        fields,
        windows=fields.windows(kinds, fields.optional_integer("sliding_window")),
        ropes=rope_config(fields),
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
    )


def gemma3_config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("gemma3", values, GEMMA3_DEFAULTS)
    kinds = alternating(fields.integer("num_hidden_layers"), fields.integer("sliding_window_pattern"))
    by_kind = dict(fields.section("rope_parameters"))
    flat = [name for name in by_kind if name not in ("full_attention", "sliding_attention")]
    if flat:
        raise fields.wrong("rope_parameters", "one object for full_attention and one for sliding_attention,")
    full = {"rope_theta": fields.get("rope_theta") if "rope_theta" in fields else 1_000_000.0}
    full |= {**(by_kind.get("full_attention") or {}), **fields.section("rope_scaling")}
    sliding = {"rope_theta": fields.get("rope_local_base_freq") if "rope_local_base_freq" in fields else 10_000.0}
    sliding |= by_kind.get("sliding_attention") or {}
    ropes = {
        "full_attention": read_rope(fields, full, fields.head_dim()),
        "sliding_attention": read_rope(fields, sliding, fields.head_dim()),
    }
    return _config(
        fields,
        windows=fields.windows(kinds, fields.optional_integer("sliding_window")),
        ropes=[ropes[kind] for kind in fields.layer_kinds(kinds)],
        qk_norm="head",
    )


def gemma3_multimodal_config(values: Mapping[str, Any]) -> ModelConfig:
    return gemma3_config(text_config(values))


def _config(fields: Fields, **differences: Any) -> ModelConfig:
    fields.refuse("use_bidirectional_attention")
    return llama_like_config(
        fields,
        activation="hidden_activation",
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        norm_offset=1.0,
        norm_placement="sandwich",
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
        logits_softcap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        **differences,
    )


def sources(config: ModelConfig) -> dict[str, Source]:
    return named_sources(config, NAMES)


GEMMA2 = Family(("Gemma2ForCausalLM",), gemma2_config, sources, ignored=LLAMA_IGNORED)
GEMMA3 = Family(("Gemma3ForCausalLM",), gemma3_config, sources, ignored=LLAMA_IGNORED)
GEMMA3_MULTIMODAL = Family(
    ("Gemma3ForConditionalGeneration",),
    gemma3_multimodal_config,
    sources,
    aliases=MULTIMODAL_ALIASES,
    ignored=MULTIMODAL_IGNORED,
)
