"""The variants with experts that make_goldens.py turns into golden checkpoints.

Numbers of experts are small and odd, so that every expert is chosen in a prompt of 40 tokens.
"""

from __future__ import annotations

from golden_variants import Variant, legacy, rope, small

YARN = {
    "beta_fast": 2.0,
    "beta_slow": 0.3,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}


def gpt_oss(**changes) -> dict:
    base = {
        "head_dim": 16,
        "num_hidden_layers": 3,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "sliding_window": 8,
        "rope_parameters": rope("yarn", 20.0, **YARN),
        "swiglu_limit": 1.5,
    }
    return small("gpt_oss", **base | changes)


def as_published(config: dict) -> dict:
    """gpt-oss' config.json: the old form, with some numbers under a second name."""
    again = {"experts_per_token": config["num_experts_per_tok"], "initial_context_length": 16}
    return legacy(config, layer_types=config["layer_types"], **again)


EXPERTS = [
    Variant(
        "mixtral",
        small("mixtral", num_local_experts=5, intermediate_size=24, num_hidden_layers=3),
        ablations={"second expert": {"num_experts_per_tok": 1}},
        rewrite_config=legacy,
    ),
    Variant(
        "mixtral_window",
        small("mixtral", num_local_experts=3, intermediate_size=24, head_dim=12, sliding_window=8),
        ablations={"window": {"sliding_window": None}},
    ),
    Variant(
        "qwen2_moe",
        small(
            "qwen2_moe",
            num_hidden_layers=4,
            num_experts=6,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            mlp_only_layers=[2],
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=3,
        ),
        ablations={
            "windows": {"use_sliding_window": False},
            "third and fourth expert": {"num_experts_per_tok": 2},
            "scores as they are": {"norm_topk_prob": True},
        },
        rewrite_config=legacy,
    ),
    Variant(
        "qwen2_moe_step",
        small(
            "qwen2_moe",
            num_hidden_layers=4,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            decoder_sparse_step=2,
            norm_topk_prob=True,
            qkv_bias=False,
        ),
        ablations={"normalised scores": {"norm_topk_prob": False}},
    ),
    Variant(
        "qwen3_moe",
        small(
            "qwen3_moe",
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        ),
        ablations={"normalised scores": {"norm_topk_prob": False}},
        rewrite_config=lambda config: legacy(config, num_experts=config.pop("num_local_experts", 6)),
    ),
    Variant(
        "qwen3_moe_windows",
        small(
            "qwen3_moe",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=8,
            mlp_only_layers=[1],
            num_hidden_layers=3,
        ),
        ablations={"windows": {"use_sliding_window": False}},
    ),
    Variant(
        "olmoe",
        small("olmoe", num_experts=6, num_experts_per_tok=3, intermediate_size=24),
        ablations={"scores as they are": {"norm_topk_prob": True}},
    ),
    Variant(
        "gpt_oss",
        gpt_oss(),
        ablations={
            "windows": {"layer_types": ["full_attention"] * 3},
            "clamp": {"swiglu_limit": 100.0},
            "untruncated range": {"rope_parameters": rope("yarn", 20.0, **YARN | {"truncate": True})},
        },
    ),
    Variant(
        "gpt_oss_mxfp4", gpt_oss(num_hidden_layers=2, intermediate_size=64), packed=True, rewrite_config=as_published
    ),
]
