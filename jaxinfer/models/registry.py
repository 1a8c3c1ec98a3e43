"""Architecture names to families. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import (
    deepseek,
    gemma,
    gemma4,
    gpt_bigcode,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen,
    qwen_moe,
    smollm3,
    starcoder2,
)
from jaxinfer.models.families.base import Family
from jaxinfer.quantization import CONFIG_KEY, from_config

_FAMILIES = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gemma.GEMMA3_MULTIMODAL,
    gemma4.FAMILY,
    gemma4.MULTIMODAL,
    phi3.FAMILY,
    gpt_bigcode.FAMILY,
    starcoder2.FAMILY,
    olmo2.FAMILY,
    smollm3.FAMILY,
    mixtral.FAMILY,
    qwen_moe.QWEN2,
    qwen_moe.QWEN3,
    olmoe.FAMILY,
    gpt_oss.FAMILY,
    deepseek.V2,
    deepseek.V3,
)

ARCHITECTURES: dict[str, Family] = {name: family for family in _FAMILIES for name in family.architectures}


def resolve(config_json: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family of a parsed `config.json`, and its ModelConfig.

    ValueError for an architecture that is not supported (with those that are), and for an option inside a supported
    one that is not.
    """
    names = config_json.get("architectures")
    if not isinstance(names, list) or not names:
        raise ValueError(
            f"config.json names no architecture (architectures={names!r}); add one of: {', '.join(ARCHITECTURES)}"
        )
    for name in names:
        if name in ARCHITECTURES:
            family, quantization = ARCHITECTURES[name], from_config(config_json)
            if quantization is not None:
                config_json = {key: value for key, value in config_json.items() if key != CONFIG_KEY}
            return family, replace(family.config(config_json), quantization=quantization)
    raise ValueError(f"architecture {names[0]!r} is not supported; those that are: {', '.join(ARCHITECTURES)}")
