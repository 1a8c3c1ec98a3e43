"""Real processes over Gloo: they give the tokens of one, and none outlives another's loss."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.process import free_port, processes
from tests.e2e.harness import GOLDENS, copy_with_tokenizer

MODEL = GOLDENS / "llama3_gqa"
GOLDEN = np.load(MODEL / "golden.npz")
PROMPTS = [GOLDEN[f"prompt_{i}"].tolist() for i in range(2)]
GREEDY = [GOLDEN[f"greedy_{i}"].tolist()[:8] for i in range(2)]
SIZES = ["--max-model-len=96", "--page-size=4", "--num-pages=60", "--max-num-seqs=4", "--max-num-batched-tokens=16"]
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs compiled once for all tests of this file."""
    return tmp_path_factory.mktemp("compiled")


def job(directory: Path, lines: list[dict[str, Any]]) -> list[str]:
    (directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--input", str(directory / "in.jsonl"), "--output", str(directory / "out.jsonl")]


def results(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "out.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda result: result["line"])


def greedy(prompt: list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}


@pytest.mark.slow
def test_four_processes_give_the_tokens_of_one(tmp_path: Path, cache: Path) -> None:
    """Rows of penalties, copied pages and scored prompts are sent too."""
    lines = [
        greedy(PROMPTS[0], 8, prompt_logprobs=0),
        greedy(PROMPTS[1], 8),
        greedy(PROMPTS[0], 8, repetition_penalty=1.00001, n=2),
    ]
    command = ["run", *job(tmp_path, lines), "--model", str(MODEL), "--mesh", "data=2,tensor=2", *SIZES]
    with processes(tmp_path, 4, command, cache) as group:
        assert group.wait(140) == [0] * 4, group.said()
    found = results(tmp_path)
    tokens = [output["token_ids"] for result in found for output in result["outputs"]]
    assert tokens == [GREEDY[0], GREEDY[1], GREEDY[0], GREEDY[0]]
    logits = GOLDEN["logits_0"].astype(np.float64)
    expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(6), PROMPTS[0][1:]]
    scored = [entry[0]["logprob"] for entry in found[0]["prompt_logprobs"][1:]]
    assert scored == pytest.approx(expected.tolist(), abs=1e-3)
    assert group.printed() == [""] * 4
    assert all(len(said) == 1 + said_of_gloo(said) for said in group.said()[1:]), "process 0 speaks for all"


@pytest.mark.slow
def test_context_and_experts_over_two_processes(tmp_path: Path, cache: Path) -> None:
    """Keys that travel, and queries; the experts' load is that of both processes."""
    model = GOLDENS / "gpt_oss"
    golden = np.load(model / "golden.npz")
    lines = [greedy(golden[f"prompt_{i}"].tolist(), 8) for i in range(2)]
    command = ["run", *job(tmp_path, lines), "--model", str(model), "--mesh", "context=2", *SIZES]
    with processes(tmp_path, 2, command, cache) as group:
        assert group.wait(140) == [0] * 2, group.said()
    tokens = [result["outputs"][0]["token_ids"] for result in results(tmp_path)]
    assert tokens == [golden[f"greedy_{i}"].tolist()[:8] for i in range(2)]
    assert any(line.startswith("expert load") for line in group.said()[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "devices", "mesh"),
    [
        ("llama3_gqa", 4, 1, "stage=2,tensor=2"),
        ("gpt_oss", 2, 2, "stage=2,tensor=2"),
        ("gpt_oss", 2, 2, "data=2,stage=2"),
        ("gemma4_e", 2, 1, "stage=2"),
        ("gemma3_text", 2, 2, "stage=4"),
        ("gemma3_text", 2, 3, "stage=3,tensor=2"),
    ],
)
def test_stages_over_processes(tmp_path: Path, cache: Path, name: str, count: int, devices: int, mesh: str) -> None:
    """Stages of one process and of several, several stages of one; heads that are the embeddings, layers with inputs of
    their own, experts whose load is counted everywhere. Scores and log-probabilities find back to process 0."""
    golden = np.load(GOLDENS / name / "golden.npz")
    prompts = [golden[f"prompt_{i}"].tolist() for i in range(2)]
    lines = [greedy(prompts[0], 8, prompt_logprobs=0), greedy(prompts[1], 8, logprobs=1), greedy(prompts[0], 8, n=2)]
    command = ["run", *job(tmp_path, lines), "--model", str(GOLDENS / name), "--mesh", mesh, *SIZES]
    with processes(tmp_path, count, command, cache, devices) as group:
        assert group.wait(280) == [0] * count, group.said()
    found = results(tmp_path)
    wanted = [golden[f"greedy_{i}"].tolist()[:8] for i in (0, 1, 0, 0)]
    assert [output["token_ids"] for result in found for output in result["outputs"]] == wanted
    logits = golden["logits_0"].astype(np.float64)
    expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(prompts[0]) - 1), prompts[0][1:]]
    scored = [entry[0]["logprob"] for entry in found[0]["prompt_logprobs"][1:]]
    assert scored == pytest.approx(expected.tolist(), abs=1e-3)
    assert len(found[1]["outputs"][0]["logprobs"]) == 8
    assert any(line.startswith("expert load") for line in group.said()[0]) == (name == "gpt_oss")


def said_of_gloo(lines: list[str]) -> int:
    return sum("[Gloo]" in line for line in lines)


def test_two_processes_end_together(tmp_path: Path, cache: Path) -> None:
    """In one test, so that all but the first job find its programs."""
    for lost, mesh in ((1, "tensor=2"), (0, "stage=2")):
        kill_one(made(tmp_path / f"killed-{lost}"), cache, lost, mesh)
    drain_server(made(tmp_path / "server"), cache)


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


@pytest.mark.slow
def test_the_last_stage_is_killed(tmp_path: Path, cache: Path) -> None:
    """While process 0 waits for its tokens."""
    kill_one(tmp_path, cache, 1, "stage=2")


def kill_one(directory: Path, cache: Path, lost: int, mesh: str) -> None:
    """In the middle of steps, most of whose time goes by in collectives; what was answered before is kept."""
    lines = [greedy(PROMPTS[0], 8), *(greedy(PROMPTS[0], 80) for _ in range(200))]
    command = ["run", *job(directory, lines), "--model", str(MODEL), "--mesh", mesh, *SIZES]
    with processes(directory, 2, command, cache) as group:
        group.wait_for(directory / "out.jsonl", '"line": 1,')
        started = time.monotonic()
        group.signal(lost, signal.SIGKILL)
        statuses = group.wait(30)
        assert time.monotonic() - started < 15
    assert statuses[lost] == -signal.SIGKILL
    assert statuses[1 - lost] == 2
    name = f"process 1 on {HOST}" if lost else f"process 0 at {group.address}"
    last = group.said()[1 - lost][-1]
    assert last.startswith(f"error: {name} is lost: its connection ")
    assert last.endswith("start all processes again")
    found = results(directory)
    assert found[0]["outputs"][0]["token_ids"] == GREEDY[0]
    assert all(len(result["outputs"][0]["token_ids"]) == 80 for result in found[1:])


def drain_server(directory: Path, cache: Path) -> None:
    """SIGTERM of process 1 in the middle of an answer, which is still given to its end."""
    model, port = copy_with_tokenizer(MODEL.name, directory / "model"), free_port()
    command = ["serve", "--model", str(model), "--mesh=tensor=2", "--port=0", f"--http-port={port}", *SIZES]
    with processes(directory, 2, command, cache) as group:
        group.wait_for(directory / "stderr.0", "health: SERVING")
        client = http.client.HTTPConnection("localhost", port, timeout=60)
        request = {"model": "model", "prompt": PROMPTS[0], "max_tokens": 80, "temperature": 0, "ignore_eos": True}
        body = json.dumps({**request, "stream": True, "stream_options": {"include_usage": True}})
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = client.getresponse()
        assert answer.readline().startswith(b"data: ")
        group.signal(1, signal.SIGTERM)
        *_, usage, done, _ = answer.read().split(b"\n\n")
        client.close()
        assert done == b"data: [DONE]"
        assert json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"] == 80
        assert group.wait(20) == [0, 0], group.said()
    assert f"process 1 on {HOST} was asked to stop (SIGTERM)" in group.said()[0]


@pytest.mark.parametrize("asked", [1, 0])
def test_sigterm_of_one_stops_all(tmp_path: Path, cache: Path, asked: int) -> None:
    """Process 0 stops as it does alone, whichever of them was asked."""
    command = ["fake", *job(tmp_path, [{"prompt": f"prompt {i}", "max_tokens": 9} for i in range(5000)])]
    with processes(tmp_path, 2, command, cache) as group:
        group.wait_for(tmp_path / "out.jsonl", '"line": 1,')
        group.signal(asked, signal.SIGTERM)
        assert group.wait(20) == [128 + signal.SIGTERM] * 2
    first, second = group.said()
    assert "the same command with --resume does the rest" in first[-2]
    assert first[-1] == "stopped"
    assert second[-1] == "process 0 has ended with exit status 143"
    if asked:
        assert f"process 1 on {HOST} was asked to stop (SIGTERM)" in first


def test_a_model_that_is_none_is_a_line(tmp_path: Path, cache: Path) -> None:
    command = ["run", *job(tmp_path, [greedy([5], 1)]), "--model", str(tmp_path), "--mesh", "tensor=2"]
    with processes(tmp_path, 2, command, cache) as group:
        assert group.wait(60) == [2, 2]
    first, second = group.said()
    assert first[-1].startswith("error: ")
    assert "config.json" in first[-1]
    assert second[-1] == "process 0 has ended with exit status 2"
    assert not any("Traceback" in line for line in first + second)
