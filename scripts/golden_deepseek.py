"""The DeepSeek variants that make_goldens.py turns into golden checkpoints."""

from __future__ import annotations

from golden_variants import PLAIN_ROPE, Variant, legacy, legacy_type_key, rope, small


def deepseek(model_type: str, **changes) -> dict:
    """A small configuration, its sizes all different; the layers have no experts."""
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
]
