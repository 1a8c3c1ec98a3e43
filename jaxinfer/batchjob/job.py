"""The job: lines in, results out, with the engine kept full and nothing else in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxinfer.batchjob.lines import InputFile
from jaxinfer.batchjob.records import failure_record, result_record
from jaxinfer.batchjob.requests import Failure, Work, read_work
from jaxinfer.batchjob.results import ResultsFile
from jaxinfer.types import Request, RequestOutput

if TYPE_CHECKING:
    from jaxinfer.engine import Engine


@dataclass(frozen=True)
class JobSettings:
    """model_name: as answers give it. max_in_flight: requests the engine holds at once, running and waiting."""

    model_name: str
    seed: int
    sampling_defaults: Mapping[str, Any]
    max_in_flight: int


@dataclass
class JobCounts:
    """Lines answered by this run; `first_failure` is the message of its first error record."""

    num_done: int = 0
    num_failed: int = 0
    first_failure: str | None = None


@dataclass
class _Open:
    """A line in the engine: one request for each of its prompts."""

    work: Work
    outputs: dict[str, RequestOutput | None] = field(default_factory=dict)


class Job:
    """One run over the input. `counts` is true at any moment, an interrupted one included."""

    def __init__(self, engine: Engine, source: InputFile, results: ResultsFile, settings: JobSettings) -> None:
        self.counts = JobCounts()
        self._engine = engine
        self._source = source
        self._results = results
        self._settings = settings
        self._on_line: Callable[[int], None] = _ignore
        self._open: dict[str, _Open] = {}  # by request id

    def run(self, on_line: Callable[[int], None] | None = None) -> JobCounts:
        """Answer every line that has no result yet. JobError where reading or writing fails.

        on_line: called after each result is written, with the number of tokens generated for it.
        """
        self._on_line = on_line or _ignore
        lines = (line for line in self._source.lines() if line.number not in self._results.digests)
        more = True
        while more or self._open:
            while more and len(self._open) < self._settings.max_in_flight:
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    self._admit(read_work(line, self._settings.sampling_defaults, self._settings.seed))
            if self._open:
                if not self._engine.has_unfinished():
                    raise RuntimeError(f"the engine lost {len(self._open)} requests")
                for output in self._engine.step():
                    if output.finished:
                        self._finish(output)
        return self.counts

    def _admit(self, work: Work | Failure) -> None:
        if isinstance(work, Failure):
            self._fail(work)
            return
        try:
            requests = self._requests(work)
        except ValueError as error:
            self._fail(_failure(work, str(error)))
            return
        opened = _Open(work, {request.request_id: None for request in requests})
        for request in requests:
            try:
                self._engine.add_request(request)
            except ValueError as error:
                for request_id in [name for name in opened.outputs if name in self._open]:
                    self._engine.abort(request_id)
                    del self._open[request_id]
                self._fail(_failure(work, str(error)))
                return
            self._open[request.request_id] = opened

    def _requests(self, work: Work) -> list[Request]:
        # A model without a tokenizer serves token ids, so it is asked for only where there is text.
        prompts: list[tuple[str | None, Sequence[int]]] = [
            (prompt, self._engine.tokenizer.encode(prompt)) if isinstance(prompt, str) else (None, prompt)
            for prompt in work.prompts
        ]
        if work.kind == "chat":
            prompts.append((None, self._engine.tokenizer.apply_chat_template(work.messages, **work.template_arguments)))
        return [
            Request(
                request_id=f"{work.line.number}.{index}",
                prompt_token_ids=tuple(token_ids),
                sampling_params=work.sampling_params,
                prompt=text,
                arrival_time=time.monotonic(),
            )
            for index, (text, token_ids) in enumerate(prompts)
        ]

    def _finish(self, output: RequestOutput) -> None:
        opened = self._open.pop(output.request_id, None)
        if opened is None:  # the end of a request this job aborted
            return
        opened.outputs[output.request_id] = output
        outputs = [part for part in opened.outputs.values() if part is not None]
        if len(outputs) < len(opened.outputs):
            return
        errors = [part.error for part in outputs if part.error is not None]
        if errors:
            self._fail(_failure(opened.work, errors[0], status_code=500))
            return
        record = result_record(
            opened.work,
            outputs,
            model=self._settings.model_name,
            created=int(time.time()),
        )
        self._results.write(record)
        self.counts.num_done += 1
        self._on_line(sum(len(part.token_ids) for whole in outputs for part in whole.outputs))

    def _fail(self, failure: Failure) -> None:
        record = failure_record(failure)
        self._results.write(record)
        self.counts.num_done += 1
        self.counts.num_failed += 1
        if self.counts.first_failure is None:
            self.counts.first_failure = f"line {failure.line.number}: {failure.message}"
        self._on_line(0)


def _ignore(num_tokens: int) -> None:
    """No progress is shown."""


def _failure(work: Work, message: str, status_code: int = 400) -> Failure:
    return Failure(work.line, message, work.kind != "plain", work.user_id, work.has_id, status_code)
