"""A model directory for every kind of tokenizer, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tokenizer.small_tokenizers import KINDS, write_model_dir


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory for every kind of tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        kind: write_model_dir(root / kind, build(), settings, model_type)
        for kind, (build, settings, model_type) in KINDS.items()
    }
