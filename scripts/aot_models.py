"""Compile the real step of large models for TPU slices that are not there, and hold it to a hand count.

    make aot                                        # after the kernels
    python scripts/aot_models.py --cases 70B 405B
    python scripts/aot_models.py --quick            # one model on one slice

Weights are shapes alone. For every model and mesh this prints one device's memory (weights by the layout and by hand,
the cache, scratch of a decode step), the collectives of a whole step by kind, number and bytes, and what a step can not
be faster than by the bytes it reads. It fails where weights differ from the hand count by 5 % or more, where a layer
under tensor parallelism alone has other than two all-reduces or gathers anything, and where the cache is not updated in
place.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before jax is imported: stay on the CPU, and keep libtpu from asking which TPU it is on.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxinfer.config import EngineConfig
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.layout import bytes_per_device, check_layout
from jaxinfer.models.model import Model
from jaxinfer.models.registry import resolve as resolve_family
from jaxinfer.plan import Plan, resolve
from jaxinfer.runner.programs import Programs
from jaxinfer.runner.segments import segments
from jaxinfer.runner.step_programs import StepPrograms
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.sharding.rules import param_shardings

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.1 70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Llama 3.1 405B": {
        **_LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
    "Qwen3 235B A22B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "DeepSeek V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}
# Bytes a second of one device's memory, published.
BANDWIDTH = {"v5p": 2765e9, "v6e": 1640e9, "tpu7x": 3690e9}
DTYPE_BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"


@dataclass(frozen=True)
class Case:
    """A model on a slice. tokens: of one shard's decode step, a sequence each."""

    model: str
    slice: str
    mesh: str
    tokens: int = 64


CASES = (
    Case("Llama 3.1 70B", "v6e:2x4", "tensor=8"),
    Case("Llama 3.1 70B", "v5p:2x2x2", "tensor=8"),
    Case("Llama 3.1 70B", "tpu7x:2x2x1", "tensor=8"),
    Case("Llama 3.1 405B", "v6e:8x8", "fsdp=8,tensor=8"),
    Case("Llama 3.1 405B", "v5p:4x4x4", "fsdp=64"),
    Case("Llama 3.1 405B", "tpu7x:2x4x4", "data=2,fsdp=4,tensor=8"),
    Case("Qwen3 235B A22B", "v6e:4x8", "expert=8,tensor=4"),
    Case("Qwen3 235B A22B", "v5p:2x4x4", "expert=32"),
    Case("Qwen3 235B A22B", "tpu7x:2x2x2", "expert=4,tensor=4"),
    Case("DeepSeek V3", "v6e:8x16", "expert=16,tensor=8"),
    Case("DeepSeek V3", "v5p:4x4x4", "expert=16,tensor=4"),
    Case("DeepSeek V3", "tpu7x:2x4x4", "expert=64"),
)


def hand_count(config: dict[str, Any], sizes: dict[str, int]) -> float:
    """Bytes of one device's weights in bfloat16: the matrices alone, from the model's published sizes."""
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    whole = 0  # a layer's matrices that tensor parallelism does not cut
    if "kv_lora_rank" in config:
        q_rank, rank, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
        key, value = config["qk_nope_head_dim"], config["v_head_dim"]
        whole = width * (q_rank + rank + rope)
        attention = heads * (q_rank * (key + rope) + rank * (key + value) + value * width)
    else:
        head = config.get("head_dim", width // heads)
        attention = width * head * (2 * heads + 2 * config["num_key_value_heads"])
    num_experts = config.get("num_experts", config.get("n_routed_experts", 0))
    expert = 3 * width * config.get("moe_intermediate_size", 0)
    num_dense = config.get("first_k_dense_replace", 0) if num_experts else layers
    dense = num_dense * 3 * width * config["intermediate_size"]
    shared = (layers - num_dense) * expert * config.get("n_shared_experts", 0)
    routed = (layers - num_dense) * expert * num_experts / sizes["expert"]
    cut = 2 * config["vocab_size"] * width + layers * attention + dense + shared + routed
    return 2 * (cut / sizes["tensor"] + layers * whole) / sizes["fsdp"]


def collectives(text: str) -> Counter[tuple[str, int]]:
    """How often a compiled program has each (kind, bytes of the result)."""
    found: Counter[tuple[str, int]] = Counter()
    for match in re.finditer(rf"= (\([^=]*?\)|\S+) ({KINDS})(?:-start)?\(", text):
        sizes = [
            DTYPE_BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
            for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])
            if dtype in DTYPE_BYTES
        ]
        found[match[2], max(sizes)] += 1
    return found


def compile_step(case: Case, config: dict[str, Any]) -> dict[str, Any]:
    """The programs of one decode step, and what they say of themselves. AssertionError for what must not be.

    Of the ends and the sampler only what they move and their scratch is read.
    """
    _, model_config = resolve_family(config)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=case.slice).devices
    mesh = make_mesh(case.mesh, devices)
    check_layout(model_config, mesh)
    model = Model(model_config, jnp.bfloat16)
    placed = param_shardings(model.abstract_params, model.logical_axes, mesh)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract_params,
        placed,
    )
    engine = EngineConfig(
        "abstract", max_model_len=8192, max_num_seqs=case.tokens, num_pages=2048, compilation_cache_dir=False
    )
    plan = resolve(engine, model_config, jnp.dtype("bfloat16"), mesh)
    ends = {name: value for name, value in params.items() if name != "layers"}
    cut = segments(plan)
    layers = tuple(tuple(params["layers"][str(index)] for index in segment.layers) for segment in cut)
    programs = StepPrograms(model, plan, ends, layers, Programs(EngineMetrics(), None))
    layout = programs.layout(case.tokens)
    moved: Counter[tuple[str, int]] = Counter()
    scratch = 0
    with jax.set_mesh(mesh):
        texts: dict[int, Counter[tuple[str, int]]] = {}
        for number, segment in enumerate(cut):
            program = programs.layers(layout, number)
            if id(program) not in texts:
                texts[id(program)] = collectives(program.as_text())
                scratch = max(scratch, program.memory_analysis().temp_size_in_bytes)
                check_pools(program, plan, segment.pools)
                check_weights(program, layers[number])
                check_collectives(texts[id(program)], mesh.shape, len(segment.layers))
            moved.update(texts[id(program)])
        for program in (programs.begin(layout), programs.end(layout), programs.sampler(case.tokens)):
            moved.update(collectives(program.as_text()))
            scratch = max(scratch, program.memory_analysis().temp_size_in_bytes)
    weights = bytes_per_device(model.abstract_params, placed)
    by_hand = hand_count(config, dict(mesh.shape))
    assert abs(weights / by_hand - 1) < 0.05, f"weights {weights} B, by hand {by_hand:.0f} B"
    return {
        "devices": mesh.size,
        "weights": weights,
        "by_hand": by_hand,
        "cache": plan.kv_cache_bytes // mesh.size,
        "scratch": scratch,
        "moved": moved,
    }


def check_weights(program: Any, layers: Any) -> None:
    """What the compiled program takes is no less than its device's part of the layers' weights, and not much more."""
    weights = bytes_per_device(layers, jax.tree.map(lambda leaf: leaf.sharding, layers))
    memory = program.memory_analysis()
    taken = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    assert weights <= taken < 1.05 * weights + 2**24, f"arguments take {taken} B, the weights {weights} B"


def check_pools(program: Any, plan: Plan, pools: tuple[int, ...]) -> None:
    """The segment's pools are updated where they are: what is aliased is them and the residual stream."""
    costs = {layer.pool: math.prod(layer.backend.pool_shape(layer.case, 1)) for layer in plan.layers}
    groups = {layer.pool: layer.group for layer in plan.layers}
    size = sum(2 * costs[pool] * plan.num_pages[groups[pool]] for pool in pools)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= size, f"{memory.alias_size_in_bytes} B aliased, the pools have {size} B"


def check_collectives(found: Counter[tuple[str, int]], sizes: Any, num_layers: int) -> None:
    """Two all-reduces a layer under tensor parallelism; nothing else but under fsdp (weights) and expert (rows).

    Gathers and scatters of those two XLA makes all-reduces of where it takes them for faster.
    """
    number = Counter[str]()
    for (kind, _), count in found.items():
        number[kind] += count
    expected = 2 * num_layers if sizes["tensor"] > 1 else 0
    if sizes["fsdp"] > 1 or sizes["expert"] > 1:
        assert number["all-reduce"] >= expected, f"{number['all-reduce']} all-reduces, expected {expected} or more"
    else:
        assert number["all-reduce"] == expected, f"{number['all-reduce']} all-reduces, expected {expected}"
        assert number["all-gather"] == 0, f"{number['all-gather']} all-gathers"


def report(case: Case) -> bool:
    started = time.perf_counter()
    label = f"{case.model:<16} {case.slice:<11} {case.mesh:<24}"
    try:
        found = compile_step(case, MODELS[case.model])
    except Exception as error:  # whatever the compiler says of one case, the others are still compiled
        print(f"{label} FAILED {type(error).__name__}: {str(error)[:400]}", flush=True)
        return False
    kinds: dict[str, list[int]] = {}
    for (kind, size), count in found["moved"].items():
        total = kinds.setdefault(kind, [0, 0])
        total[0] += count
        total[1] += count * size
    moved = ", ".join(f"{count} {kind} {size / 2**20:.0f} MiB" for kind, (count, size) in sorted(kinds.items()))
    least = found["weights"] / BANDWIDTH[case.slice.split(":")[0]] * 1e3
    print(
        f"{label} weights {found['weights'] / 2**30:6.2f} GiB (by hand {found['by_hand'] / 2**30:6.2f}), "
        f"cache {found['cache'] / 2**30:.2f}, scratch {found['scratch'] / 2**30:.2f}; {moved}; "
        f"at least {least:.1f} ms to read the weights  ({time.perf_counter() - started:.0f} s)",
        flush=True,
    )
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the step of large models without a TPU.")
    parser.add_argument("--cases", nargs="+", default=[], help="those whose model, slice or mesh contains one of these")
    parser.add_argument("--quick", action="store_true", help="the first case alone")
    arguments = parser.parse_args()
    wanted = arguments.cases or [""]
    cases = [case for case in CASES if any(text in f"{case.model} {case.slice} {case.mesh}" for text in wanted)]
    if not cases:
        parser.error(f"nothing matches {wanted}; models are {', '.join(MODELS)}")
    results = [report(case) for case in (cases[:1] if arguments.quick else cases)]
    print(f"{len(results)} models and slices, {results.count(False)} failed")
    return 1 if False in results else 0


if __name__ == "__main__":
    sys.exit(main())
