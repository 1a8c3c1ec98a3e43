"""The DeepSeek variants that make_goldens.py turns into golden checkpoints."""

from __future__ import annotations

from golden_variants import PLAIN_ROPE, Variant, legacy, legacy_type_key, rope, small


def deepseek(model_type: str, **changes) -> dict:
    """A small configuration, its sizes all different; without changes its two layers have no experts."""
    base = small(
        model_type,
        hidden_size=36,
        num_attention_heads=3,
        num_key_value_heads=3,
        kv_lora_rank=20,
        q_lora_rank=14,
        qk_nope_head_dim=10,
        qk_rope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=2,
    )
    return base | changes


def experts(**changes) -> dict:
    """Experts in the last two of three layers."""
    return {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "moe_intermediate_size": 16,
    } | changes


def yarn(**changes) -> dict:
    parameters = {
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 2.0,
        "beta_slow": 0.3,
        "mscale": 1.5,
        "mscale_all_dim": 0.8,
    }
    return rope("yarn", 50.0, **parameters | changes)


DEEPSEEK = [
    Variant(
        "deepseek_v2_dense",
        deepseek("deepseek_v2", q_lora_rank=None, rope_parameters=yarn()),
        ablations={
            "rope scaling": {"rope_parameters": rope("default", 50.0)},
            "mscale": {"rope_parameters": yarn(mscale=0.0, mscale_all_dim=0.0)},
        },
        rewrite_config=legacy_type_key,
    ),
    Variant(
        "deepseek_v3_dense",
        deepseek(
            "deepseek_v3", rope_interleave=False, attention_bias=True, rms_norm_eps=1e-3, rope_parameters=PLAIN_ROPE
        ),
        ablations={"pairs half and half": {"rope_interleave": True}},
        rewrite_config=legacy,
    ),
    Variant(
        "deepseek_v2_lite",
        deepseek(
            "deepseek_v2", q_lora_rank=None, **experts(), rope_parameters=yarn(mscale=0.707, mscale_all_dim=0.707)
        ),
        ablations={"third expert": {"num_experts_per_tok": 2}},
        rewrite_config=legacy,
    ),
    Variant(
        "deepseek_v2",
        deepseek(
            "deepseek_v2",
            **experts(),
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=3.0,
            rope_parameters=yarn(mscale=0.707, mscale_all_dim=0.707),
        ),
        ablations={
            "groups": {"topk_method": "greedy"},
            "scaling": {"routed_scaling_factor": 1.0},
        },
        rewrite_config=lambda config: legacy_type_key(config) | {"scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    Variant(
        "deepseek_v3",
        deepseek(
            "deepseek_v3",
            **experts(n_shared_experts=1),
            n_group=4,
            topk_group=2,
            rope_parameters=yarn(mscale=1.0, mscale_all_dim=1.0),
        ),
        ablations={
            "groups": {"topk_group": 4},
            "normalised scores": {"norm_topk_prob": False},
            "scaling": {"routed_scaling_factor": 1.0},
        },
        rewrite_config=lambda config: (
            legacy_type_key(config) | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
        ),
    ),
]
