"""The text part of Gemma 4: Gemma 3's skeleton with larger heads in the layers that see everything, values that are
normed, the upper layers reading the keys and values of lower ones, and a small extra embedding for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import LayerConfig, ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.families.fields import Fields
from jaxinfer.models.families.gemma import (
    MULTIMODAL_ALIASES,
    MULTIMODAL_IGNORED,
    NAMES,
    alternating,
    text_config,
)
from jaxinfer.models.families.llama_like import LLAMA_IGNORED, model_config
from jaxinfer.models.families.llama_like import sources as named_sources
from jaxinfer.models.families.rope_fields import read_rope

DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
DEFAULT_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
# Checkpoints hold, and never use, keys and values for the layers that read another's.
SHARED_KV_IGNORED = tuple(f"*.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm", "v_norm"))


def config(values: Mapping[str, Any]) -> ModelConfig:
    fields = Fields("gemma4", values, DEFAULTS)
    fields.refuse("enable_moe_block")
    if "use_bidirectional_attention" in fields and fields.get("use_bidirectional_attention") not in (None, "vision"):
        fields.refuse("use_bidirectional_attention")
    per_layer_dim = fields.optional_integer("hidden_size_per_layer_input", minimum=0) or 0
    return model_config(
        fields,
        _layers(fields),
        activation="hidden_activation",
        attention_scale=1.0,
        norm_placement="sandwich",
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_bias"),
        qk_norm="head",
        value_norm=True,
        logits_softcap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        per_layer_input_dim=per_layer_dim,
        per_layer_input_vocab=fields.integer("vocab_size_per_layer_input") if per_layer_dim else 0,
        layer_scalar=True,
    )


def multimodal_config(values: Mapping[str, Any]) -> ModelConfig:
    return config(text_config(values))


def _layers(fields: Fields) -> tuple[LayerConfig, ...]:
    num_layers = fields.integer("num_hidden_layers")
    kinds = fields.layer_kinds(alternating(num_layers, 6))
    kinds = (*kinds[:-1], "full_attention")  # as transformers does, whatever the file says of the last layer
    first_shared = num_layers - fields.integer("num_kv_shared_layers", minimum=0)
    double_wide = fields.flag("use_double_wide_mlp")
    by_kind = fields.section("rope_parameters") or DEFAULT_ROPES
    layers = []
    for index, kind in enumerate(kinds):
        full = kind == "full_attention"
        shared = index >= first_shared
        head_dim, num_kv_heads = _heads(fields, index, full)
        if not isinstance(by_kind.get(kind), dict):
            raise fields.wrong("rope_parameters", f"an object with {kind!r} inside")
        if shared and kind not in kinds[:first_shared]:
            raise fields.wrong("num_kv_shared_layers", f"small enough to leave a {kind} layer with keys of its own")
        layers.append(
            LayerConfig(
                num_heads=fields.integer("num_attention_heads"),
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                ffn_dim=fields.integer("intermediate_size") * (2 if shared and double_wide else 1),
                window=None if full else fields.integer("sliding_window"),
                rope=read_rope(fields, by_kind[kind], head_dim),
                kv_source=first_shared - 1 - kinds[:first_shared][::-1].index(kind) if shared else None,
                value_is_key=full and not shared and fields.flag("attention_k_eq_v"),
            )
        )
    return tuple(layers)


def _heads(fields: Fields, index: int, full: bool) -> tuple[int, int]:
    """A layer's head dim and number of kv heads: from `per_layer_config`, or by whether it sees everything."""
    own: dict[str, Any] = {}
    if fields.section("per_layer_config"):
        own = fields.section("per_layer_config").get(str(index)) or {}
        unknown = sorted(set(own) - {"head_dim", "num_key_value_heads"})
        if unknown:
            raise fields.wrong("per_layer_config", f"free of {unknown[0]!r} (layer {index})")
    elif full:
        own = {"head_dim": fields.integer("global_head_dim")}
        if fields.flag("attention_k_eq_v") and fields.get("num_global_key_value_heads") is not None:
            own["num_key_value_heads"] = fields.get("num_global_key_value_heads")
    layer = Fields(fields.family, own, {name: fields.get(name) for name in ("head_dim", "num_key_value_heads")})
    return layer.integer("head_dim"), layer.integer("num_key_value_heads")


def sources(config: ModelConfig) -> dict[str, Source]:
    found = named_sources(config, NAMES)
    if config.per_layer_input_dim:
        found["per_layer/embed/weight"] = Source("model.embed_tokens_per_layer.weight")
        found["per_layer/projection/weight"] = Source("model.per_layer_model_projection.weight")
        found["per_layer/norm/weight"] = Source("model.per_layer_projection_norm.weight")
    for index in range(len(config.layers)):
        ours, theirs = f"layers/{index}", f"model.layers.{index}"
        found[f"{ours}/scalar"] = Source(f"{theirs}.layer_scalar")
        if config.per_layer_input_dim:
            found[f"{ours}/per_layer/gate/weight"] = Source(f"{theirs}.per_layer_input_gate.weight")
            found[f"{ours}/per_layer/projection/weight"] = Source(f"{theirs}.per_layer_projection.weight")
            found[f"{ours}/per_layer/norm/weight"] = Source(f"{theirs}.post_per_layer_input_norm.weight")
    return found


FAMILY = Family(("Gemma4ForCausalLM",), config, sources, ignored=(*LLAMA_IGNORED, *SHARED_KV_IGNORED))
MULTIMODAL = Family(
    ("Gemma4ForConditionalGeneration",),
    multimodal_config,
    sources,
    aliases=MULTIMODAL_ALIASES,
    ignored=(*MULTIMODAL_IGNORED, *SHARED_KV_IGNORED),
)
