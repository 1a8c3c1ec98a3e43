"""`scripts/bench kernels` where there is no accelerator: it says so, or runs itself on tiny shapes."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    monkeypatch.setattr(sys, "argv", ["bench", "kernels", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(BENCH), run_name="__main__")
    return left.value.code


def test_nothing_to_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(monkeypatch) == 0
    assert capsys.readouterr().out.startswith("jax finds no TPU and no GPU, so there is nothing to time")


def test_on_tiny_shapes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line is there."""
    assert bench(monkeypatch, "--allow-cpu") == 0
    out = capsys.readouterr().out
    assert "decode, GQA 2, pages of 8, 2 x 40" in out
    assert "decode, GQA 2, pages of 8, int8, 2 x 40" in out
    assert "of the time with float32" in out
    assert "pallas_gpu" in out
    assert "the platform is cpu, not gpu" in out
    assert "prefill by xla: median" in out
    assert "0 of 4 failed, or are not the reference's" in out


def test_results_that_are_not_the_references(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    figures = importlib.import_module("kernel_figures")
    monkeypatch.setattr(figures, "decode_lines", lambda *_: iter(()))
    monkeypatch.setattr(figures, "paged_reference", lambda *_, **__: (jnp.ones(()), None))
    monkeypatch.setattr(figures, "flash_reference", broken)
    assert figures.report(quick=True, allow_cpu=True) == 1
    out = capsys.readouterr().out
    assert "FAILED RuntimeError: broken" in out
    assert "WRONG by" in out
    assert "2 of 2 failed" in out


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("broken")
