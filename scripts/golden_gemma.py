"""The Gemma variants that make_goldens.py turns into golden checkpoints."""

from __future__ import annotations

from golden_variants import VOCAB, Variant, legacy, rope, small

GEMMA2 = [
    Variant(
        "gemma2",
        small(
            "gemma2",
            num_hidden_layers=3,
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=12,
            pad_token_id=0,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=4.0,
        ),
        ablations={
            "windows": {"sliding_window": 100},
            "attention soft cap": {"attn_logit_softcapping": None},
            "logits' soft cap": {"final_logit_softcapping": None},
            "attention scale": {"query_pre_attn_scalar": 16},
        },
    ),
    Variant(
        "gemma2_plain_legacy",
        small(
            "gemma2",
            head_dim=6,
            sliding_window=8,
            query_pre_attn_scalar=6,
            attention_bias=True,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            tie_word_embeddings=False,
        ),
        rewrite_config=lambda config: legacy(config, hidden_act="silu", cache_implementation="hybrid"),
    ),
]

GEMMA3_ROPE = {"full_attention": rope("linear", 5000.0, factor=8.0), "sliding_attention": rope("default", 100.0)}


def gemma3(**changes) -> dict:
    return (
        small(
            "gemma3_text",
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            head_dim=8,
            sliding_window=8,
            query_pre_attn_scalar=8,
            pad_token_id=0,
            rope_parameters=GEMMA3_ROPE,
        )
        | changes
    )


def gemma3_legacy(config: dict) -> dict:
    """As published: one number for the pattern of layers, the two ropes' bases apart."""
    ropes = config.pop("rope_parameters")
    scaling = {key: value for key, value in ropes["full_attention"].items() if key != "rope_theta"}
    config.pop("layer_types")
    config["torch_dtype"] = config.pop("dtype")
    return config | {
        "sliding_window_pattern": 3,
        "rope_theta": ropes["full_attention"]["rope_theta"],
        "rope_local_base_freq": ropes["sliding_attention"]["rope_theta"],
        "rope_scaling": scaling,
    }


def gemma3_multimodal(config: dict) -> dict:
    """The text model inside an image and text model's config.json."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "dtype": config.pop("dtype"),
        "eos_token_id": config["eos_token_id"],
        "mm_tokens_per_image": 4,
        "text_config": config,
        "vision_config": vision | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
    }


GEMMA3_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]

GEMMA3 = [
    Variant(
        "gemma3_text",
        gemma3(num_hidden_layers=6),
        ablations={
            "windows": {"sliding_window": 100},
            "layer types": {"layer_types": ["sliding_attention"] * 6},
            "global scaling": {"rope_parameters": GEMMA3_ROPE | {"full_attention": rope("default", 5000.0)}},
            "local base": {"rope_parameters": GEMMA3_ROPE | {"sliding_attention": rope("default", 5000.0)}},
        },
    ),
    Variant(
        "gemma3_text_legacy",
        gemma3(
            num_attention_heads=3,
            num_key_value_heads=1,
            query_pre_attn_scalar=10,
            layer_types=GEMMA3_LAYERS,
            final_logit_softcapping=4.0,
        ),
        ablations={
            "logits' soft cap": {"final_logit_softcapping": None},
            "attention scale": {"query_pre_attn_scalar": 8},
        },
        rewrite_config=gemma3_legacy,
    ),
    Variant(
        "gemma3_multimodal",
        gemma3(layer_types=GEMMA3_LAYERS),
        rewrite_config=gemma3_multimodal,
        rename=lambda name: f"language_model.{name}",
        ignored_tensors={
            "vision_tower.vision_model.embeddings.patch_embedding.bias": (8,),
            "multi_modal_projector.mm_input_projection_weight": (8, 24),
        },
    ),
]

GEMMA4_ROPE = {
    "full_attention": rope("proportional", 1000.0, partial_rotary_factor=0.25),
    "sliding_attention": rope("default", 100.0),
}


def gemma4(**changes) -> dict:
    return (
        small(
            "gemma4_text",
            hidden_size=24,
            intermediate_size=32,
            head_dim=8,
            global_head_dim=16,
            sliding_window=8,
            pad_token_id=0,
            rope_parameters=GEMMA4_ROPE,
        )
        | changes
    )


def gemma4_e(**changes) -> dict:
    """Like E2B and E4B: per-layer inputs; the last layers read earlier layers' keys and values and are twice as wide.

    Layers 3 to 6 share: the sliding ones with layer 2 (not 0), the full ones with layer 1.
    """
    sliding, full = "sliding_attention", "full_attention"
    return (
        gemma4(
            num_attention_heads=3,
            num_key_value_heads=1,
            num_hidden_layers=7,
            num_kv_shared_layers=4,
            layer_types=[sliding, full, sliding, sliding, full, sliding, full],
            use_double_wide_mlp=True,
            intermediate_size=24,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB,
            final_logit_softcapping=8.0,
        )
        | changes
    )


def gemma4_published(config: dict) -> dict:
    """As published: the full layers' sizes under names of their own instead of one entry per layer."""
    layers = config.pop("per_layer_config")
    full = next(iter(layers.values()))
    config["global_head_dim"] = full["head_dim"]
    config["num_global_key_value_heads"] = full.get("num_key_value_heads")
    return config


def gemma4_multimodal(config: dict) -> dict:
    """The text model inside an image, sound and text model's config.json."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "audio_config": None,
        "dtype": config.pop("dtype"),
        "text_config": gemma4_published(config),
        "tie_word_embeddings": True,
        "vision_config": None,
    }


GEMMA4 = [
    Variant(
        "gemma4_e",
        gemma4_e(),
        ablations={
            "windows": {"sliding_window": 100},
            "unrotated part of global heads": {
                "rope_parameters": GEMMA4_ROPE | {"full_attention": rope("default", 1000.0)}
            },
            "logits' soft cap": {"final_logit_softcapping": None},
        },
        rewrite_config=gemma4_published,
    ),
    Variant(
        "gemma4_dense",
        gemma4(num_hidden_layers=6, num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0),
        ablations={"windows": {"sliding_window": 100}},
    ),
    Variant(
        "gemma4_multimodal",
        gemma4_e(
            num_attention_heads=2, tie_word_embeddings=True, use_double_wide_mlp=False, hidden_size_per_layer_input=16
        ),
        rewrite_config=gemma4_multimodal,
        rename=lambda name: name.replace("model.", "model.language_model.", 1),
        ignored_tensors={
            "model.embed_vision.embedding_projection.weight": (24, 8),
            "model.language_model.layers.5.self_attn.k_proj.weight": (8, 24),
            "model.language_model.layers.5.self_attn.v_proj.weight": (8, 24),
            "model.language_model.layers.5.self_attn.k_norm.weight": (8,),
        },
    ),
]

GEMMA: list[Variant] = [*GEMMA2, *GEMMA3, *GEMMA4]
