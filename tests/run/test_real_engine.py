"""The command over the real engine and the bundled model: results as LLM gives them, resumed as undisturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxinfer import LLM, Engine, run
from jaxinfer.config import default_model
from jaxinfer.types import SamplingParams

ROOT = Path(__file__).parents[2]
# A small engine: few programs to compile, and requests that wait for one another.
SMALL: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 8}
FLAGS = [item for name, value in SMALL.items() for item in (f"--{name.replace('_', '-')}", str(value))]
TEXTS = ["def mean(values):\n", "class Stack:\n", "import os\n", "    return ", "for i in range(", "@property\n"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(default_model(), **SMALL)


@pytest.fixture(scope="module")
def engine(llm: LLM) -> Engine:
    """One engine for the module; each job leaves it empty."""
    return llm.engine


def records(path: Path) -> list[dict[str, Any]]:
    """Without times, in the input's order."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for record in found:
        record.pop("metrics", None)
        if "response" in record:
            record["response"]["body"].pop("created", None)
        elif "usage" in record:  # what is cached depends on what ran before
            del record["usage"]["prompt_tokens_details"]
    return sorted(found, key=lambda record: record.get("line") or int(record["id"].split("_")[2]))


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def sampled_lines() -> list[dict[str, Any]]:
    return [{"prompt": text, "max_tokens": 3 + 5 * i, "temperature": 0.9} for i, text in enumerate(TEXTS * 2)]


def test_job_gives_what_generate_gives(llm: LLM, tmp_path: Path) -> None:
    write(tmp_path / "in", [{"prompt": text, "max_tokens": 12, "temperature": 0} for text in TEXTS])
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert run.main(flags, open_engine=lambda config: llm.engine) == 0
    outputs = llm.generate(TEXTS, SamplingParams(max_tokens=12, temperature=0))
    for record, output in zip(records(tmp_path / "out"), outputs, strict=True):
        assert record["outputs"][0]["token_ids"] == output.outputs[0].token_ids
        assert record["outputs"][0]["text"] == output.outputs[0].text
        assert record["usage"]["prompt_tokens"] == len(output.prompt_token_ids)


def test_one_bad_line_takes_no_other_down(engine: Engine, tmp_path: Path) -> None:
    body = {"prompt": ["import ", "from "], "max_tokens": 4, "temperature": 0, "logprobs": 2}
    openai = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    lines = [
        {"prompt": "x = 1\n" * 200},
        {"prompt": "import ", "max_tokens": 4, "temperature": 0},
        {"prompt": [10**7]},
        {"prompt": "a", "top_p": 7},
        openai,
    ]
    write(tmp_path / "in", lines)
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert run.main(flags, open_engine=lambda config: engine) == 1
    too_long, good, no_token, bad_value, several = records(tmp_path / "out")
    assert "128" in too_long["error"]["message"]
    assert "10000000" in no_token["error"]["message"]
    assert "top_p=7" in bad_value["error"]["message"]
    choices = several["response"]["body"]["choices"]
    assert choices[0]["text"] == good["outputs"][0]["text"]
    assert "".join(choices[1]["logprobs"]["tokens"]) == choices[1]["text"]
    assert not engine.has_unfinished()


def test_resumed_is_uninterrupted(engine: Engine, tmp_path: Path) -> None:
    write(tmp_path / "in", sampled_lines())
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert run.main(flags, open_engine=lambda config: engine) == 0
    whole = (tmp_path / "out").read_bytes()
    expected = records(tmp_path / "out")
    (tmp_path / "out").write_bytes(whole[: len(whole) // 3])
    assert run.main([*flags, "--resume"], open_engine=lambda config: engine) == 0
    assert records(tmp_path / "out") == expected


def test_prompt_streams_what_a_job_writes(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", [{"prompt": "def f(", "max_tokens": 20, "temperature": 0.8}])
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert run.main(flags, open_engine=lambda config: engine) == 0
    capsys.readouterr()
    prompt = ["--prompt", "def f(", "--max-tokens", "20", "--temperature", "0.8"]
    assert run.main(prompt, open_engine=lambda config: engine) == 0
    assert capsys.readouterr().out == records(tmp_path / "out")[0]["outputs"][0]["text"] + "\n"


def test_killed_process_is_finished_by_another(engine: Engine, tmp_path: Path) -> None:
    write(tmp_path / "in", sampled_lines())
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "jaxinfer.run", *flags, *FLAGS]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while process.poll() is None and not ((tmp_path / "out").exists() and (tmp_path / "out").stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = [line for line in (tmp_path / "out").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert run.main([*flags, "--resume"], open_engine=lambda config: engine) == 0
    assert (tmp_path / "out").read_bytes().startswith(b"".join(kept))
    assert [record["line"] for record in records(tmp_path / "out")] == list(range(1, 1 + len(sampled_lines())))


@pytest.mark.parametrize(("model", "message"), [("missing", "missing"), (".", "config.json")])
def test_no_model_is_one_line(tmp_path: Path, model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", [{"prompt": "a"}])
    flags = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(tmp_path / model)]
    assert run.main(flags) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
