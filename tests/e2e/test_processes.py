"""What only another process shows: programs kept on disk serve it, and several devices give the tokens of one."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.llm import LLM
from tests.e2e.harness import GOLDENS, random_prompts
from tests.e2e.process import in_own_process

SIZES = {"max_model_len": 96, "page_size": 4, "num_pages": 60, "max_num_seqs": 4, "max_num_batched_tokens": 16}


def test_second_start_compiles_nothing(tmp_path: Path) -> None:
    """Under another hash seed, that is another order of sets; the model has two rope bases and two kinds of layer."""
    prompts = random_prompts(1, 20, 7)
    first, second = (
        in_own_process(
            GOLDENS / "gemma3_text",
            prompts,
            {"PYTHONHASHSEED": seed},
            compilation_cache_dir=str(tmp_path / "made" / "compiled"),
            **SIZES,
        )
        for seed in ("1", "3")
    )
    assert first["loaded"] == 0
    assert first["compiled"] >= 3
    assert (second["loaded"], second["compiled"]) == (first["compiled"], 0)
    assert first["tokens"] == second["tokens"]


def test_cache_directory_that_cannot_be_made(
    model_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine goes on without, and says so."""
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        llm = LLM(model_directory, compilation_cache_dir=str(tmp_path / "file" / "compiled"), **SIZES)
    assert "compiled programs are not kept" in caplog.text
    stats = llm.engine.stats()
    assert stats.num_programs_compiled + stats.num_programs_loaded > 0


def test_two_devices_give_the_tokens_of_one(compiled_programs: Path) -> None:
    stored = np.load(GOLDENS / "llama3_gqa" / "golden.npz")
    prompts = [stored[f"prompt_{i}"].tolist() for i in range(2)]
    result = in_own_process(
        GOLDENS / "llama3_gqa",
        prompts,
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        mesh="tensor=2",
        compilation_cache_dir=str(compiled_programs),
        **SIZES,
    )
    assert result["devices"] == 2
    assert result["tokens"] == [stored[f"greedy_{i}"].tolist()[:8] for i in range(2)]
