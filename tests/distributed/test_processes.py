"""Real processes, one device each, over Gloo: the tokens of one, and no process outlives another's loss."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.process import SIZES, Processes, processes
from tests.e2e.harness import GOLDENS

MODEL = GOLDENS / "llama3_gqa"
GOLDEN = np.load(MODEL / "golden.npz")
PROMPTS = [GOLDEN[f"prompt_{i}"].tolist() for i in range(2)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs compiled once for all tests of this file."""
    return tmp_path_factory.mktemp("compiled")


def job(directory: Path, mesh: str, lines: list[dict[str, Any]]) -> list[str]:
    (directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", str(directory / "in.jsonl"), "--output", str(directory / "out.jsonl")]
    return ["run", *files, "--model", str(MODEL), "--mesh", mesh, *SIZES]


def greedy(prompt: list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}


@pytest.mark.parametrize(("count", "mesh"), [(2, "tensor=2"), (4, "data=2,tensor=2")])
def test_processes_give_the_tokens_of_one(tmp_path: Path, cache: Path, count: int, mesh: str) -> None:
    """Penalties, copied pages and scored prompts are told too."""
    lines = [
        greedy(PROMPTS[0], 8, logprobs=2, prompt_logprobs=1),
        greedy(PROMPTS[1], 8),
        greedy(PROMPTS[0], 8, repetition_penalty=1.0001, n=2),
    ]
    with processes(tmp_path, count, job(tmp_path, mesh, lines), cache) as group:
        assert group.wait(120) == [0] * count, group.said()
    print(*group.said())
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    results.sort(key=lambda result: result["line"])
    expected = [GOLDEN[f"greedy_{i}"].tolist()[:8] for i in range(2)]
    assert [output["token_ids"] for result in results for output in result["outputs"]] == [
        expected[0],
        expected[1],
        expected[0],
        expected[0],
    ]
    prompt_logprobs = results[0]["prompt_logprobs"]
    logits = GOLDEN["logits_0"]
    normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [entry[0]["logprob"] for entry in prompt_logprobs[1:]] == pytest.approx(
        normalised[np.arange(len(PROMPTS[0]) - 1), PROMPTS[0][1:]].tolist(), abs=1e-3
    )
    for output in group.outputs:
        assert output.read_text() == ""


@pytest.mark.parametrize(
    ("lost", "kind", "statuses", "line"),
    [
        (1, signal.SIGKILL, [2, -signal.SIGKILL], "error: process 1 on {host} is lost: its connection"),
        (0, signal.SIGKILL, [-signal.SIGKILL, 2], "error: process 0 at localhost:{port} is lost: its connection"),
        (1, signal.SIGTERM, [143, 143], "process 1 on {host} was asked to stop (SIGTERM)"),
        (0, signal.SIGTERM, [143, 143], "process 0 has ended with exit status 143"),
    ],
)
def test_a_process_that_goes_ends_all(
    tmp_path: Path, cache: Path, lost: int, kind: signal.Signals, statuses: list[int], line: str
) -> None:
    lines = [greedy(PROMPTS[0], 2), *(greedy(PROMPTS[0], 80) for _ in range(200))]
    with processes(tmp_path, 2, job(tmp_path, "tensor=2", lines), cache) as group:
        group.wait_for(tmp_path / "out.jsonl", '"line": 1,')
        started = time.monotonic()
        group.signal(lost, kind)
        assert group.wait(10) == statuses, group.said()
        assert time.monotonic() - started < 5
        _check_line(group, lost if kind == signal.SIGTERM and lost else 1 - lost, line)
    for result in (tmp_path / "out.jsonl").read_text().splitlines():
        assert len(json.loads(result)["outputs"][0]["token_ids"]) in (2, 80)


def _check_line(group: Processes, who: int, line: str) -> None:
    pass
