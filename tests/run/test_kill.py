"""A job that is killed, interrupted or terminated in a process of its own, and finished by --resume."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NUM_LINES = 100


def start(directory: Path, *flags: str, step_seconds: float = 0.002) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.run.fake_engine", "--output", str(directory / "out.jsonl"), *flags]
    if "--prompt" not in flags and "--input" not in flags:
        command += ["--input", str(directory / "in.jsonl")]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "FAKE_STEP_SECONDS": str(step_seconds)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_input(directory: Path, count: int = NUM_LINES) -> None:
    # Long ids make long records, whose writes a kill has a chance to tear.
    lines = ({"prompt": f"prompt {i}", "id": "z" * 20_000, "max_tokens": 2 + i % 9} for i in range(count))
    (directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def wait_for_results(directory: Path, process: subprocess.Popen[str], beyond: int = 0) -> None:
    """Until the output is longer than `beyond` bytes, or the process has ended."""
    output = directory / "out.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and not (output.exists() and output.stat().st_size > beyond):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def results(path: Path) -> list[dict[str, Any]]:
    """Without times, in the input's order."""
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    kept = ({key: value for key, value in record.items() if key != "metrics"} for record in records)
    return sorted(kept, key=lambda record: record["line"])


def test_killed_again_and_again_every_line_is_answered_once(tmp_path: Path) -> None:
    write_input(tmp_path)
    output = tmp_path / "out.jsonl"
    rng = random.Random(0)
    kills = 0
    while kills < 12:
        before = whole_lines(output) if output.exists() else []
        process = start(tmp_path, "--resume")
        if kills:  # the first is killed while it starts
            wait_for_results(tmp_path, process, sum(map(len, before)))
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        # No result of an earlier run is ever touched.
        assert whole_lines(output)[: len(before)] == before if output.exists() else not before
        if rng.random() < 0.3 and output.exists():
            with output.open("ab") as file:  # a torn line, whether or not the kill left one
                file.write(b'{"line": 5, "dig')
        if process.returncode == 0:
            break
    process = start(tmp_path, "--resume")
    assert "answered" in process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert kills >= 3  # or the machine is too fast for this test to mean anything

    whole = tmp_path / "whole"
    whole.mkdir()
    write_input(whole)
    assert start(whole, step_seconds=0).wait(timeout=60) == 0
    assert results(output) == results(whole / "out.jsonl")
    assert [record["line"] for record in results(output)] == list(range(1, NUM_LINES + 1))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_job_keeps_results_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    write_input(tmp_path, 2000)
    process = start(tmp_path)
    wait_for_results(tmp_path, process)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert "Traceback" not in error
    count = len(whole_lines(tmp_path / "out.jsonl"))
    assert 0 < count < 2000
    assert f"{count:,} lines answered so far" in error
    assert "--resume does the rest" in error


def test_standard_input_is_an_input(tmp_path: Path) -> None:
    process = start(tmp_path, "--input", "-", step_seconds=0)
    lines = "".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(5))
    error = process.communicate(lines, timeout=60)[1]
    assert process.returncode == 0, error
    assert [record["line"] for record in results(tmp_path / "out.jsonl")] == [1, 2, 3, 4, 5]


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.run.fake_engine", "--prompt", "x", "--max-tokens", "150"]
    env = {**os.environ, "FAKE_STEP_SECONDS": "0.005"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert "Traceback" not in error
    assert "Exception ignored" not in error
