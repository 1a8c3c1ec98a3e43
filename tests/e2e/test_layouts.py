"""The layout changes where things live, never what comes out: every mesh gives the tokens of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.loading import load_model
from tests.e2e.harness import GOLDENS
from tests.sharding.run_on_devices import run_on_devices

LAYOUTS = {
    "llama3_gqa": ["data=2,fsdp=2,tensor=2"],
    "smollm3": ["stage=2,context=2,tensor=2"],  # layers with rope and without
    "gpt_bigcode_mqa": ["context=2,tensor=4"],  # one kv head: every device has it
    "gemma2": ["data=2,context=2,tensor=2", "stage=3"],  # windows, soft caps
    "gemma4_e": ["stage=2,fsdp=2,context=2"],  # keys shared across layers, per-layer inputs, two head dims
    "olmo2": ["tensor=2"],  # a norm over all heads
    "qwen3_moe_windows": ["fsdp=2,expert=2,tensor=2"],
    "gpt_oss": ["context=2,tensor=2"],  # sinks, biases
    "deepseek_v3": ["stage=2,context=2,expert=2", "data=2,expert=4"],  # latent attention, grouped routing
    "deepseek_v3_dense": ["tensor=3"],
}


QUICK = "llama3_gqa"  # the others are left to `make test-slow`


CASES = [*((golden, "auto") for golden in LAYOUTS), ("llama3_gqa", "int8"), ("deepseek_v3", "float8_e4m3fn")]


@pytest.mark.parametrize(
    ("golden", "kv_cache_dtype"),
    [pytest.param(*case, marks=[] if case == (QUICK, "auto") else [pytest.mark.slow]) for case in CASES],
)
def test_every_layout_gives_the_tokens_of_one_device(golden: str, kv_cache_dtype: str) -> None:
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.e2e.layouts", json.dumps([golden, ["", *LAYOUTS[golden]], kv_cache_dtype])],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    alone, *spread = json.loads(result.stdout.splitlines()[-1])
    assert alone["devices"] == 1
    assert alone["preemptions"] > 0 or golden == "qwen3_moe_windows"  # whose rings all fit
    assert alone["hits"] > 0
    for mesh, answer in zip(LAYOUTS[golden], spread, strict=True):
        assert answer["devices"] > 1
        assert answer["tokens"] == alone["tokens"], mesh
        if mesh in ("context=2,tensor=2", "tensor=3"):  # one shard, so that the same tokens are computed
            assert answer["experts"] == alone["experts"], mesh
    layers = alone["experts"]
    assert bool(layers) == ("moe" in golden or golden in ("gpt_oss", "deepseek_v3"))
    assert len({sum(counts) for _, counts in layers}) <= 1, "layers with experts saw different numbers of tokens"


REFUSALS = {
    "tensor=4": "mesh axis tensor=4 does not divide num_heads=6 of layer 0; use one of 1, 2, 6",
    "tensor=3": "mesh axis tensor=3 neither divides num_kv_heads=2 of layer 0 nor is a multiple of it; "
    "use one of 1, 2, 6",
    "fsdp=7": "mesh axis fsdp=7 does not divide the model's width of 30; use a size that does",
    "stage=5": "mesh axis stage=5: this model has 2 layers; use at most 2",
    "expert=2": "mesh axis expert=2: this model has no experts; use data",
    "data=9": "mesh='data=9' needs 9 devices and 8 are there; choose axis sizes that multiply to 8",
}


def test_what_can_not_be_laid_out_is_refused_before_anything_is_read() -> None:
    code = f"""
from jaxinfer.loading import load_model
for mesh in {list(REFUSALS)}:
    try:
        load_model({str(GOLDENS / "llama3_gqa")!r}, mesh=mesh)
    except ValueError as error:
        print(error)
"""
    assert run_on_devices(code, 8).splitlines() == list(REFUSALS.values())


def test_a_model_too_large_for_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfer.models.layout.memory_limit", lambda mesh: 2**16)
    with pytest.raises(
        ValueError,
        match=r"GiB it has; spread them over \d+ times as many devices",
    ):
        load_model(GOLDENS / "llama3_gqa")


GATHERED = """
import math, re
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from tests.e2e.harness import GOLDENS

config = EngineConfig(str(GOLDENS / "gpt_bigcode_mqa"), mesh="fsdp=2", max_model_len=32, max_num_seqs=2,
                      max_num_batched_tokens=8, num_pages=8, compilation_cache_dir=False)
programs, = Engine(config).runner._programs
text = programs.begin(programs.layout(8)).as_text()
moved = re.findall(r"= \\(?[a-z]+\\d+\\[([\\d,]*)\\].* (?:all-gather|all-to-all)\\(", text)
largest = max(math.prod(map(int, filter(None, shape.split(",")))) for shape in moved)
print(len(moved) > 0, largest <= 8 * programs._model.config.hidden_size)
"""


def test_of_embeddings_that_are_stored_apart_rows_are_gathered() -> None:
    """fsdp: of the table of tokens and the table of positions."""
    assert run_on_devices(GATHERED, 2).split() == ["True", "True"]
