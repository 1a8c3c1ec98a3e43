"""The whole command over a fake engine: every line once, whatever is in it and whatever happens."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxinfer import run
from jaxinfer.batchjob.results import ResultsFile
from jaxinfer.config import EngineConfig
from tests.run.fake_engine import FakeEngine


class Command:
    """`python -m jaxinfer.run` in this process, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.input = directory / "in.jsonl"
        self.output = directory / "out.jsonl"
        self.engine: FakeEngine | None = None
        self.options: dict[str, Any] = {}

    def write(self, *lines: Any) -> None:
        self.input.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))

    def __call__(self, *flags: str) -> int:
        return self.main("--input", str(self.input), "--output", str(self.output), *flags)

    def main(self, *flags: str) -> int:
        self.engine = None
        return run.main(flags, open_engine=self._open)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def _open(self, config: EngineConfig) -> FakeEngine:
        self.engine = FakeEngine(config, **self.options)
        return self.engine


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt {i}", "max_tokens": 1 + i % 7} for i in range(count)]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [{key: value for key, value in record.items() if key != "metrics"} for record in records]
    return sorted(kept, key=lambda record: record["line"])


def test_plain_lines(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write({"prompt": "abc", "id": None, "max_tokens": 3, "n": 2}, "", {"prompt": [97, 98], "logprobs": 2})
    assert command() == 0
    first, second = sorted(command.records(), key=lambda record: record["line"])
    assert (first["line"], first["prompt"], first["id"]) == (1, "abc", None)
    assert [len(part["token_ids"]) for part in first["outputs"]] == [3, 3]
    assert first["outputs"][0]["text"] == bytes(first["outputs"][0]["token_ids"]).decode()
    assert first["outputs"][0]["finish_reason"] == "length"
    assert first["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert first["metrics"]["time_to_first_token"] >= 0
    assert "logprobs" not in first["outputs"][0]
    assert (second["line"], second["prompt"], "id" in second) == (3, [97, 98], False)
    chosen, *best = second["outputs"][0]["logprobs"][0]
    assert chosen["token_id"] == second["outputs"][0]["token_ids"][0]
    assert chosen["logprob"] == -9999.0  # the fake's is minus infinity, which JSON cannot write
    assert chosen["token"] == chr(chosen["token_id"])
    assert [entry["rank"] for entry in best] == [1, 2]
    assert [entry["token"] for entry in best] == ["token_id:0", chr(1)]  # the fake has no text for 0
    table = capsys.readouterr().err
    assert "output tokens        22" in table
    assert "2 lines answered" in table


def test_openai_lines(command: Command) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    completion = {"prompt": ["a", "b"], "max_tokens": 3, "n": 2, "logprobs": 1, "model": "x"}
    command.write(
        {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "two", "method": "POST", "url": "/v1/completions", "body": completion},
        {"custom_id": "three", "method": "POST", "url": "/v1/completions", "body": {}},
    )
    assert command("--model", "some/where/tiny/") == 1
    records = {record["custom_id"]: record for record in command.records()}
    for record in records.values():
        assert record.keys() == {"id", "custom_id", "response", "error"}
        assert record["error"] is None
        assert record["response"].keys() == {"status_code", "request_id", "body"}

    body = records["one"]["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"]) == 2
    assert choice["finish_reason"] == "length"
    entry = choice["logprobs"]["content"][0]
    assert entry["bytes"] == list(entry["token"].encode())
    assert [top["token"] for top in entry["top_logprobs"]] == ["token_id:0", chr(1)]  # not the chosen one, of rank 400
    assert body["usage"]["prompt_tokens"] == len("<user>hi<assistant>")

    body = records["two"]["response"]["body"]
    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 12
    logprobs = body["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == body["choices"][0]["text"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 3

    failed = records["three"]["response"]
    assert failed["status_code"] == 400
    assert failed["body"]["error"]["message"].startswith("line 3: prompt must be")


def test_bad_lines_become_error_records_and_the_job_goes_on(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    command.options = {"fails": "poison"}
    broken = {
        "custom_id": "c",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "broken", "content": ""}]},
    }
    multi = {"custom_id": "m", "url": "/v1/completions", "body": {"prompt": ["fine", "y" * 300]}}
    command.write(
        "not json", {"prompt": "good"}, {"prompt": "x" * 300, "id": "long"}, broken, {"prompt": "poison"}, multi
    )
    assert command() == 1
    by_line = {int(r.get("line") or r["id"].split("_")[2]): r for r in command.records()}
    assert sorted(by_line) == [1, 2, 3, 4, 5, 6]
    assert by_line[1]["error"]["message"].startswith("line 1: not JSON")
    assert "outputs" in by_line[2]
    assert by_line[3]["id"] == "long"
    assert "the limit is 200" in by_line[3]["error"]["message"]
    assert "refuses the role" in by_line[4]["response"]["body"]["error"]["message"]
    assert by_line[5]["error"] == {"message": "line 5: the model's logits are not finite", "type": "server_error"}
    assert by_line[6]["response"]["status_code"] == 400
    assert command.engine is not None
    assert not command.engine.requests  # the fitting half of line 6 was aborted
    assert "error: 5 lines failed" in capsys.readouterr().err


def test_input_is_streamed_and_the_engine_kept_full_but_bounded(command: Command) -> None:
    command.write(*prompts(100))
    assert command("--max-num-seqs", "5") == 0
    assert command.engine is not None
    assert command.engine.most_in_flight == 10
    assert sorted(record["line"] for record in command.records()) == list(range(1, 101))


def test_sampling_flags_reach_lines(command: Command) -> None:
    command.write({"prompt": "a"}, {"prompt": "a", "max_tokens": 2})
    assert command("--max-tokens", "5", "--n", "2") == 0
    first, second = without_times(command.records())
    assert [len(part["token_ids"]) for part in first["outputs"]] == [5, 5]
    assert [len(part["token_ids"]) for part in second["outputs"]] == [2, 2]


def test_output_that_is_there_is_not_touched(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(3))
    assert command() == 0
    before = command.output.read_bytes()
    assert command() == 2
    assert "add --resume to finish it or --overwrite to replace it" in capsys.readouterr().err
    assert command.output.read_bytes() == before
    assert command.engine is None
    assert command("--overwrite") == 0
    assert without_times(command.records()) == without_times([json.loads(x) for x in before.splitlines()])


def test_overwrite_keeps_the_old_results_until_the_engine_is_up(command: Command) -> None:
    command.write(*prompts(3))
    assert command() == 0
    before = command.output.read_bytes()

    def refuse(config: EngineConfig) -> FakeEngine:
        raise ValueError("no weights in here")

    flags = ("--input", str(command.input), "--output", str(command.output), "--overwrite")
    assert run.main(flags, open_engine=refuse) == 2
    assert command.output.read_bytes() == before


@pytest.mark.parametrize("torn", [b"", b"{", b'{"line": 7, "digest": "12', b'{"line": 7}'])
def test_resume_answers_the_rest_and_gives_what_an_uninterrupted_job_gives(command: Command, torn: bytes) -> None:
    command.write(*prompts(20))
    assert command("--max-num-seqs", "3") == 0
    whole = command.output.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (0, 1, 7, 19):
        command.output.write_bytes(b"".join(lines[:kept]) + torn)
        assert command("--resume", "--max-num-seqs", "4") == 0
        assert command.output.read_bytes().startswith(b"".join(lines[:kept]))
        assert without_times(command.records()) == without_times([json.loads(line) for line in lines])


def test_resume_of_a_finished_job_starts_no_engine(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(3), "bad")
    assert command("--resume") == 1  # --resume may also begin a job
    assert command("--resume") == 1  # and remembers that a line failed
    assert command.engine is None
    assert "all 4 lines" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["line", "shorter", "sampling", "seed", "model"])
def test_resume_refuses_another_job(command: Command, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(5))
    assert command("--max-tokens", "4") == 0
    flags = ["--max-tokens", "4"]
    if change == "line":
        command.write(*prompts(2), {"prompt": "other"}, *prompts(5)[3:])
    elif change == "shorter":
        command.write(*prompts(4))
    elif change == "sampling":
        flags = ["--max-tokens", "5"]
    else:
        flags += ["--seed", "1"] if change == "seed" else ["--model", "other"]
    before = command.output.read_bytes()
    assert command("--resume", *flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert command.output.read_bytes() == before
    assert command.engine is None


@pytest.mark.parametrize("text", ['{"a": 1}\n', "[]\n", "x\n", '{"custom_id": "a", "id": "b"}\n'])
def test_resume_refuses_a_file_that_is_not_its_own(command: Command, text: str) -> None:
    command.write(*prompts(2))
    command.output.write_text(text)
    assert command("--resume") == 2
    assert command.output.read_text() == text


def test_resume_refuses_two_results_of_a_line(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(2))
    assert command() == 0
    command.output.write_bytes(command.output.read_bytes() * 2)
    assert command("--resume") == 2
    assert "two results of input line" in capsys.readouterr().err


def test_two_jobs_cannot_write_one_file(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(2))
    other = ResultsFile(str(command.output), "new")
    assert command("--resume") == 2
    assert "another job is writing" in capsys.readouterr().err
    other.close()
    assert command("--resume") == 0


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `limit` bytes, as on a full disk.

    No bytecode is written meanwhile: Python would keep what fits of a module's, and fail to import it ever after.
    """
    before, writes = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = writes


def test_full_disk_keeps_whole_lines(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    # Lines of 2000 bytes or so: the second one reaches over the limit, and the write takes a part of it.
    command.write(*({"prompt": "x" * 50, "id": "y" * 1500} for _ in range(4)))
    with small_files(3000):
        assert command() == 2
    assert len(command.records()) == 1
    error = capsys.readouterr().err
    assert "error: cannot write" in error
    assert "--resume does the rest" in error
    assert "Traceback" not in error
    assert command("--resume") == 0
    assert sorted(record["line"] for record in command.records()) == [1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_full_device_is_one_line(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(2))
    assert command.main("--input", str(command.input), "--output", "/dev/full") == 2
    assert "error: cannot write /dev/full: No space left on device" in capsys.readouterr().err


def test_unwritable_output(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(2))
    for path in (tmp_path, tmp_path / "missing" / "out"):
        assert command.main("--input", str(command.input), "--output", str(path)) == 2
        assert f"error: cannot write {path}" in capsys.readouterr().err


def test_results_are_there_as_soon_as_they_are_finished(command: Command) -> None:
    command.write(*prompts(20))
    seen: list[int] = []

    class Watching(FakeEngine):
        def step(self) -> Any:
            seen.append(len(command.records()))
            return super().step()

    flags = ("--input", str(command.input), "--output", str(command.output))
    assert run.main(flags, open_engine=lambda config: Watching(config)) == 0
    assert len(set(seen)) > 5


def test_a_defect_shows_its_traceback_and_keeps_results(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(20))

    class Broken(FakeEngine):
        def step(self) -> Any:
            if len(command.records()) > 3:
                raise ZeroDivisionError("oops")
            return super().step()

    flags = ("--input", str(command.input), "--output", str(command.output))
    assert run.main(flags, open_engine=lambda config: Broken(config)) == 3
    error = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in error
    assert "--resume does the rest" in error
    assert command("--resume") == 0
    assert sorted(record["line"] for record in command.records()) == list(range(1, 21))


def test_an_engine_that_loses_a_request_is_found_out(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(2))

    class Forgetful(FakeEngine):
        def step(self) -> Any:
            self.requests.clear()
            return []

    flags = ("--input", str(command.input), "--output", str(command.output))
    assert run.main(flags, open_engine=lambda config: Forgetful(config)) == 3
    assert "the engine lost 2 requests" in capsys.readouterr().err


BAD_FLAGS = [
    ([], "nothing to do"),
    (["--input", "IN"], "--output is missing"),
    (["--input", "IN", "--output", "OUT", "--resume", "--overwrite"], "contradict"),
    (["--input", "-", "--output", "OUT", "--resume"], "standard input cannot"),
    (["--input", "IN", "--output", "IN"], "same file"),
    (["--input", "IN", "--output", "OUT", "--chat"], "--chat goes with --prompt only"),
    (["--input", "MISSING", "--output", "OUT"], "cannot read the input"),
    (["--prompt", "x", "--input", "IN"], "--input does not go with --prompt"),
    (["--prompt", "x", "--output", "OUT"], "--output does not go with --prompt"),
    (["--prompt", "x", "--resume"], "--resume does not go"),
    (["--prompt", "x", "--progress"], "--progress does not go"),
    (["--prompt", "x", "--logprobs", "0"], "--logprobs does not go"),
    (["--prompt", "x", "--n", "2"], "--n 2 does not go"),
    (["--prompt", ""], "--prompt is empty"),
    (["--prompt", "x" * 300], "the limit is 200"),
    (["--input", "IN", "--output", "OUT", "--temperature", "-1"], "temperature=-1.0 is out of range"),
    (["--input", "IN", "--output", "OUT", "--num-pages", "3", "--kv-cache-memory", "1GiB"], "give one"),
    (["--input", "IN", "--output", "OUT", "--kv-cache-memory", "lots"], "kv_cache_memory='lots'"),
    (["--input", "EMPTY", "--output", "OUT"], "has no lines"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_bad_flags_are_one_line(
    command: Command, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command.write({"prompt": "a"})
    empty = command.input.with_name("empty")
    empty.write_text("\n \n")
    paths = {"IN": command.input, "OUT": command.output, "EMPTY": empty, "MISSING": empty / "x"}
    assert command.main(*(str(paths.get(flag, flag)) for flag in flags)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(("us", "ms"))]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]


@pytest.mark.parametrize("flags", [["--max-tokens", "many"], ["--inputs", "x"], ["--inp", "x"], ["--dtype", "int3"]])
def test_flags_argparse_refuses_are_one_line_too(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_prompt_for_a_model_without_tokenizer_is_one_line(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.options = {"has_tokenizer": False}
    assert command.main("--prompt", "x") == 2
    assert capsys.readouterr().err.endswith("error: no tokenizer; give token ids instead of text\n")
    command.write({"prompt": [97], "max_tokens": 2}, {"prompt": "a"})
    assert command() == 1
    assert ["error" in record for record in sorted(command.records(), key=lambda r: r["line"])] == [False, True]


def test_prompt_is_streamed(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main("--prompt", "def f", "--max-tokens", "9") == 0
    captured = capsys.readouterr()
    assert len(captured.out) == 10
    assert "5 prompt tokens, 9 output tokens (length), first after" in captured.err
    assert command.main("--prompt", "def f", "--chat") == 0
    captured = capsys.readouterr()
    assert f"{len('<user>def f<assistant>')} prompt tokens" in captured.err


def test_progress_bar_counts_lines(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(8))
    assert command("--progress") == 0
    assert "8/8" in capsys.readouterr().err


def test_what_is_not_a_file_cannot_be_resumed(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command.write(*prompts(1))
    assert command.main("--input", str(command.input), "--output", "/dev/null", "--resume") == 2
    assert "/dev/null is not a file, so it cannot be resumed" in capsys.readouterr().err
    assert command.main("--input", str(command.input), "--output", "/dev/null") == 0
