"""Models and engines of the tests through the whole engine. Compilation dominates their time, so they are shared."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from tests.e2e.harness import Twin, copy_with_tokenizer, few_programs, num_pages_held


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 2, made small: two layers of a window of 8 around one that sees all, soft caps; 93 characters."""
    return copy_with_tokenizer("gemma2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def shared_llm(model_directory: Path) -> LLM:
    """4 sequences of at most 96 tokens over a pool of 120: they do not all fit, and a step takes 16 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        return LLM(
            model_directory, max_model_len=96, page_size=4, num_pages=30, max_num_seqs=4, max_num_batched_tokens=16
        )


@pytest.fixture(scope="session")
def twin(shared_llm: LLM) -> Twin:
    return Twin(shared_llm.engine.loaded, 96)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The shared LLM; whatever a test does with it, it must be left with nothing running and every page given back."""
    engine = shared_llm.engine
    yield shared_llm
    assert not engine.has_unfinished()
    engine.scheduler.check_integrity()
    stats = engine.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, num_pages_held(engine)) == (0, 0, 0)


@pytest.fixture
def engine(llm: LLM) -> Engine:
    return llm.engine


@pytest.fixture(autouse=True)
def no_errors_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
