"""What a config.json becomes: defaults as transformers fills them in, published configs, refusals by name."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from transformers import AutoConfig

from jaxinfer.models.families.base import Family, Source
from jaxinfer.models.model import Model
from jaxinfer.models.registry import ARCHITECTURES, resolve

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
    "intermediate_size": 64,
}
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma4ForCausalLM": "gemma4_text",
    "Phi3ForCausalLM": "phi3",
    "Starcoder2ForCausalLM": "starcoder2",
    "Olmo2ForCausalLM": "olmo2",
    "SmolLM3ForCausalLM": "smollm3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
    "GptOssForCausalLM": "gpt_oss",
}
ALL_SLIDING = (  # where there is a window, every layer has it
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Starcoder2ForCausalLM",
)
PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())


def config_json(architecture: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SIZES, **changes}


@pytest.mark.parametrize("switches", [{}, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}])
@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_absent_keys_have_the_defaults_of_transformers(architecture, switches):
    _, ours = resolve(config_json(architecture, **switches))
    theirs = AutoConfig.for_model(MODEL_TYPES[architecture], **SIZES, **switches)
    always = architecture in ALL_SLIDING and theirs.sliding_window
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if always else "full_attention"] * 7
    for index, (layer, kind) in enumerate(zip(ours.layers, kinds, strict=True)):
        own = theirs.per_layer_config[index] if architecture == "Gemma4ForCausalLM" else theirs
        assert layer.num_heads == own.num_attention_heads
        assert layer.num_kv_heads == own.num_key_value_heads
        assert layer.head_dim == (getattr(own, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
        assert layer.window == (theirs.sliding_window if kind == "sliding_attention" else None)
        assert (layer.rope is not None) == bool(getattr(theirs, "no_rope_layers", [True] * 7)[index])
        if layer.experts is not None:
            assert layer.experts.num_experts == theirs.num_experts
            assert layer.experts.num_active == theirs.num_experts_per_tok
            assert layer.experts.shared_ffn_dim == getattr(theirs, "shared_expert_intermediate_size", 0)
            assert layer.ffn_dim == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.norm_eps == (getattr(theirs, "rms_norm_eps", None) or theirs.norm_epsilon)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.attention_softcap == (theirs.attn_logit_softcapping if architecture == "Gemma2ForCausalLM" else None)
    assert ours.logits_softcap == getattr(theirs, "final_logit_softcapping", None)


@pytest.mark.parametrize(("architecture", "kind"), [("V2", "deepseek_v2"), ("V3", "deepseek_v3")])
def test_deepseek_defaults(architecture, kind):
    _, ours = resolve(config_json(f"Deepseek{architecture}ForCausalLM", num_experts_per_tok=5))
    theirs = AutoConfig.for_model(kind, **SIZES, num_experts_per_tok=5)
    latent, experts = ours.layers[-1].latent, ours.layers[-1].experts
    assert latent is not None
    assert (latent.rank, latent.rope_dim, latent.q_rank) == (
        theirs.kv_lora_rank,
        theirs.qk_rope_head_dim,
        theirs.q_lora_rank,
    )
    assert (latent.key_dim, latent.value_dim) == (theirs.qk_nope_head_dim, theirs.v_head_dim)
    assert latent.interleaved == getattr(theirs, "rope_interleave", True)
    assert [layer.experts is None for layer in ours.layers] == [i < theirs.first_k_dense_replace for i in range(7)]
    assert experts is not None
    assert (experts.num_experts, experts.num_active) == (theirs.n_routed_experts, 5)
    assert (experts.num_groups, experts.num_active_groups) == (theirs.n_group or 1, theirs.topk_group or 1)
    assert (experts.scaling, experts.normalize) == (theirs.routed_scaling_factor, theirs.norm_topk_prob)
    assert experts.shared_ffn_dim == theirs.n_shared_experts * theirs.moe_intermediate_size
    assert ours.layers[-1].ffn_dim == theirs.moe_intermediate_size
    assert (ours.max_position, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.tie_embeddings == theirs.tie_word_embeddings


def test_gpt_bigcode_defaults_and_both_spellings_of_its_keys():
    old = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    new = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    configs = [resolve({"architectures": ["GPTBigCodeForCausalLM"], **keys})[1] for keys in (old, new)]
    assert configs[0] == configs[1]
    theirs = AutoConfig.for_model("gpt_bigcode", **old)
    assert configs[0].max_position == theirs.n_positions
    assert configs[0].layers[0].ffn_dim == 4 * 64  # n_inner null
    assert configs[0].layers[0].num_kv_heads == 1
    assert configs[0].activation == "gelu_tanh"
    assert configs[0].tie_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name):
    _, config = resolve(PUBLISHED[name]["config"])
    leaves = jax.tree.leaves(Model(config).abstract_params)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PUBLISHED[name]["parameters"]


def test_mistral_window_null_is_not_absent():
    assert {layer.window for layer in resolve(config_json("MistralForCausalLM"))[1].layers} == {4096}
    null = config_json("MistralForCausalLM", sliding_window=None)
    assert {layer.window for layer in resolve(null)[1].layers} == {None}


def test_which_layers_have_experts():
    def have(**changes: Any) -> list[bool]:
        _, config = resolve(config_json("Qwen2MoeForCausalLM", **changes))
        return [layer.experts is not None for layer in config.layers]

    assert have() == [True] * 7
    assert have(mlp_only_layers=[0, 5]) == [False, *[True] * 4, False, True]
    assert have(decoder_sparse_step=3, mlp_only_layers=[2]) == [False, False, False, False, False, True, False]
    assert have(num_experts=0) == [False] * 7
    _, config = resolve(config_json("Qwen2MoeForCausalLM", mlp_only_layers=[0], moe_intermediate_size=16))
    assert [layer.ffn_dim for layer in config.layers] == [64, *[16] * 6]


def test_gpt_oss_packing_and_rope():
    _, config = resolve(config_json("GptOssForCausalLM", quantization_config={"quant_method": "mxfp4"}))
    rope = config.layers[0].rope
    assert rope is not None
    assert (rope.theta, rope.factor, rope.original_max_position, rope.truncate) == (150_000, 32, 4096, False)
    assert [layer.window for layer in config.layers] == [128, None, 128, None, 128, None, 128]


def test_gemma4_layers_that_share_read_the_last_layer_of_their_kind():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"] + ["sliding_attention", "full_attention"] * 2
    changes = {"layer_types": kinds, "num_kv_shared_layers": 4, "use_double_wide_mlp": True, "attention_k_eq_v": True}
    _, config = resolve(config_json("Gemma4ForCausalLM", num_global_key_value_heads=2, **changes))
    assert [layer.kv_source for layer in config.layers] == [None, None, None, 2, 1, 2, 1]
    assert [layer.ffn_dim for layer in config.layers] == [64, 64, 64, 128, 128, 128, 128]
    assert [layer.value_is_key for layer in config.layers] == [False, True, False, False, False, False, False]
    assert [layer.num_kv_heads for layer in config.layers] == [4, 2, 4, 4, 2, 4, 2]
    assert [layer.head_dim for layer in config.layers] == [256, 512, 256, 256, 512, 256, 512]


def test_an_unknown_architecture_is_refused_with_those_that_work():
    with pytest.raises(ValueError, match=r"'MambaForCausalLM' is not supported") as refusal:
        resolve(config_json("MambaForCausalLM"))
    assert all(name in str(refusal.value) for name in ARCHITECTURES)
    for architectures in (None, [], "LlamaForCausalLM"):
        with pytest.raises(ValueError, match="names no architecture"):
            resolve({**SIZES, "architectures": architectures})


ONE_ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("LlamaForCausalLM", {"hidden_size": 0}, "hidden_size=0 must be an integer of at least 1"),
        ("LlamaForCausalLM", {"hidden_size": 64.5}, "hidden_size=64.5 must be an integer"),
        ("LlamaForCausalLM", {"hidden_size": True}, "hidden_size=True must be an integer"),
        ("LlamaForCausalLM", {"hidden_size": 65}, "hidden_size=65 must be a multiple of num_attention_heads=32"),
        ("LlamaForCausalLM", {"num_key_value_heads": 5}, "num_kv_heads=5"),
        ("LlamaForCausalLM", {"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ("LlamaForCausalLM", {"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a positive number"),
        ("LlamaForCausalLM", {"attention_bias": 1}, "attention_bias=1 must be true or false"),
        ("LlamaForCausalLM", {"hidden_act": "xielu"}, "hidden_act='xielu' must be one of silu"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "mystery"}}, "rope_type='mystery' is not supported"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ("LlamaForCausalLM", {"rope_scaling": [2]}, r"rope_scaling=\[2\] must be an object"),
        ("LlamaForCausalLM", {"rope_theta": 0}, "rope_theta=0 must be a positive number"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 must be 1"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "awq"}}, "quantization_config=.*not supported"),
        ("LlamaForCausalLM", {"alibi": True}, "alibi=True is not supported"),
        ("LlamaForCausalLM", {"num_local_experts": 8}, "num_local_experts=8 is not supported"),
        ("LlamaForCausalLM", {"head_dim": 7}, "head_dim=7 .* must be an even number"),
        ("MistralForCausalLM", {"sliding_window": -5}, "sliding_window=-5 must be an integer"),
        (
            "MistralForCausalLM",
            {"layer_types": ["full_attention"] * 6 + ["sliding_attention"]},
            "layer_types=.* must be the same for all layers",
        ),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "must be a list of 7"),
        ("Qwen2ForCausalLM", {"layer_types": ["chunked_attention"] * 7}, "layer_types=.* must be"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 7}, "no sliding_window is in use"),
        ("Qwen2ForCausalLM", {"rope_parameters": {"full_attention": ONE_ROPE}}, "one object for all layers"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"mrope_section": [1, 1, 2]}}, "mrope_section"),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Gemma3ForCausalLM", {"rope_parameters": ONE_ROPE}, "one object for full_attention"),
        ("Gemma3ForConditionalGeneration", {}, "text_config=None must be an object"),
        ("Gemma4ForCausalLM", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ("Gemma4ForCausalLM", {"enable_moe_block": True}, "enable_moe_block=True is not supported"),
        ("Gemma4ForCausalLM", {"num_kv_shared_layers": 7}, "num_kv_shared_layers=7 must be small enough"),
        ("Gemma4ForCausalLM", {"rope_parameters": ONE_ROPE}, "an object with 'sliding_attention' inside"),
        ("Gemma4ForCausalLM", {"per_layer_config": {"1": {"intermediate_size": 8}}}, "'intermediate_size'"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "must be default or longrope"),
        (
            "Phi3ForCausalLM",
            {"hidden_size": 128, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            r"short_factor=\[1.0\] must be a list of 2 numbers",
        ),
        ("GPTBigCodeForCausalLM", {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported in a olmoe model"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "num_active=9 experts a token are more than the 8"),
        (
            "MixtralForCausalLM",
            {"quantization_config": {"quant_method": "mxfp4"}},
            "quantization_config=.*not supported",
        ),
        ("GptOssForCausalLM", {"quantization_config": {"quant_method": "awq"}}, "of quant_method 'mxfp4'"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": 3}, "mlp_only_layers=3 must be a list of layers"),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be an integer"),
        ("DeepseekV2ForCausalLM", {}, "num_experts_per_tok=None must be an integer"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob=True must be False"),
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}, "must be 'greedy' or 'group_limited_greedy'"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func='softmax' must be 'sigmoid'"),
        ("DeepseekV3ForCausalLM", {"num_key_value_heads": 4}, "num_key_value_heads=4 must be num_attention_heads=32"),
        ("DeepseekV3ForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "must be default or yarn"),
        ("DeepseekV3ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq=2 must be 1"),
        ("DeepseekV3ForCausalLM", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\] must be a list of 7"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(architecture, changes, message):
    with pytest.raises(ValueError, match=message) as refusal:
        resolve(config_json(architecture, **changes))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_size_is_named(name):
    given = {key: value for key, value in config_json("LlamaForCausalLM").items() if key != name}
    with pytest.raises(ValueError, match=f"llama model lacks '{name}'"):
        resolve(given)


def test_tensors_are_found_under_any_of_their_names():
    family, config = resolve({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": SIZES})
    for old, new in (("", ""), ("model.", "model.language_model."), ("model.", "language_model.model.")):
        stored = {new + source.name.removeprefix(old) for source in family.sources(config).values()}
        assert {source.name for source in family.find_sources(config, stored).values()} == stored
    assert family.find_sources(config, [])["embed/weight"] == Source("model.embed_tokens.weight")


def test_tensors_beside_the_text_model_are_ignored_and_no_others():
    def ignores(architecture: str, tensor: str) -> bool:
        family: Family = ARCHITECTURES[architecture]
        return family.ignores(tensor)

    assert ignores("Gemma3ForConditionalGeneration", "model.vision_tower.encoder.layers.0.mlp.fc1.weight")
    assert ignores("Gemma3ForConditionalGeneration", "multi_modal_projector.mm_input_projection_weight")
    assert ignores("Gemma4ForCausalLM", "model.layers.20.self_attn.k_proj.weight")
    assert ignores("LlamaForCausalLM", "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not ignores("LlamaForCausalLM", "model.layers.0.self_attn.q_proj.bias")
    assert not ignores("Gemma3ForCausalLM", "model.layers.0.self_attn.k_proj.weight")
