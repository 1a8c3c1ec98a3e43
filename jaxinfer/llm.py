"""The offline API: prompts in, completions out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxinfer.config import EngineConfig, default_model
from jaxinfer.engine import Engine, make_request
from jaxinfer.types import FinishReason, Logprob, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from jax.sharding import Mesh

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Delta:
    """What one step added to one completion: text that is final, its tokens, and at the end the reason."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class LLM:
    """A model ready to generate, for one thread at a time.

    Keyword arguments are EngineConfig's: dtype, max_model_len, max_num_seqs, max_num_batched_tokens, num_pages or
    kv_cache_memory, page_size, enable_prefix_caching, seed and so on; `mesh` may also be a jax Mesh.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        mesh: str | Mesh | None = None,
        **settings: Any,
    ) -> None:
        """model: a directory or hub id; None is the bundled model. settings: fields of EngineConfig."""
        config = EngineConfig(
            model=str(default_model() if model is None else model),
            mesh=mesh if isinstance(mesh, str) else None,
            **settings,
        )
        self.engine = Engine(config, mesh=mesh)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or several, text or token ids; outputs come in the prompts' order.

        sampling_params: one for all, or one each. ValueError for a prompt or parameter that cannot run, before
        anything has run.
        """
        several = _as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(several)
        else:
            params = list(sampling_params)
        if len(params) != len(several):
            raise ValueError(f"{len(params)} sampling_params for {len(several)} prompts; give one, or one for each")
        requests = [self._request(prompt, chosen) for prompt, chosen in zip(several, params, strict=True)]
        return self._run(requests)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, a list of {"role", "content"}, or several, through the model's chat template."""
        if not messages:
            raise ValueError("messages is empty; give at least one message")
        several: list[Any] = [messages] if isinstance(messages[0], Mapping) else list(messages)
        prompts = [self.engine.tokenizer.apply_chat_template(conversation) for conversation in several]
        return self.generate(prompts, sampling_params)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """Complete one prompt, a Delta for each step's progress. Closing the iterator ends the request."""
        request = self._request(prompt, sampling_params or SamplingParams())
        self.engine.add_request(request)
        return self._deltas(request)

    def _deltas(self, request: Request) -> Iterator[Delta]:
        count = request.sampling_params.n
        texts, tokens, ended = [0] * count, [0] * count, [False] * count
        try:
            while self.engine.has_unfinished():
                for output in self.engine.step():
                    if output.request_id != request.request_id:
                        continue
                    _raise_error(output)
                    for i, completion in enumerate(output.outputs):
                        if ended[i] or len(completion.token_ids) == tokens[i]:
                            continue
                        ended[i] = completion.finish_reason is not None
                        logprobs = completion.logprobs
                        yield Delta(
                            i,
                            completion.text[texts[i] :],
                            completion.token_ids[tokens[i] :],
                            None if logprobs is None else logprobs[tokens[i] :],
                            completion.finish_reason,
                            completion.stop_reason,
                        )
                        texts[i], tokens[i] = len(completion.text), len(completion.token_ids)
                    if output.finished:
                        return
        finally:
            self.engine.abort(request.request_id)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        return make_request(self.engine, f"llm-{next(self._numbers)}", prompt, params)

    def _run(self, requests: Sequence[Request]) -> list[RequestOutput]:
        added: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for request in requests:
                self.engine.add_request(request)
                added.append(request.request_id)
            while len(done) < len(added):
                done.update((output.request_id, output) for output in self.engine.step() if output.finished)
        finally:
            for request_id in added:
                if request_id not in done:
                    self.engine.abort(request_id)
        return [done[request.request_id] for request in requests]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _raise_error(output: RequestOutput) -> None:
    if output.error is not None:
        raise RuntimeError(output.error)
