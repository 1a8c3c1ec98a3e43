"""One small engine behind many short-lived servers: compilation dominates the tests' time, so it happens once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from tests.e2e.conftest import few_buckets
from tests.e2e.harness import copy_with_tokenizer, few_programs, num_pages_held
from tests.serving.harness import CHAT_TEMPLATE

__all__ = ["few_buckets"]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy_with_tokenizer("gemma2", tmp_path_factory.mktemp("served") / "small")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def shared_llm(model_directory: Path) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        return LLM(
            model_directory, max_model_len=96, page_size=4, num_pages=60, max_num_seqs=4, max_num_batched_tokens=16
        )


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The engine whose answers are the right ones, and which the servers use; whatever happens, it is left empty."""
    engine = shared_llm.engine
    yield shared_llm
    assert not engine.has_unfinished()
    engine.scheduler.check_integrity()
    stats = engine.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, num_pages_held(engine)) == (0, 0, 0)


@pytest.fixture
def engine(llm: LLM) -> Engine:
    return llm.engine


@pytest.fixture
def errors_expected() -> bool:
    """Overridden where a test breaks something on purpose."""
    return False


@pytest.fixture(autouse=True)
def no_errors_logged(caplog: pytest.LogCaptureFixture, errors_expected: bool) -> Iterator[None]:
    yield
    errors = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert bool(errors) == errors_expected, errors
