"""The offline API: prompts in, completions out."""

from __future__ import annotations

import itertools
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxinfer.config import EngineConfig, default_model
from jaxinfer.engine import Engine, make_request
from jaxinfer.types import FinishReason, Logprob, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxinfer.models.model import Params

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
        if isinstance(mesh, str):
            settings["mesh"] = mesh
        config = EngineConfig(model=str(default_model() if model is None else model), **settings)
        self.engine = Engine(config, mesh=None if isinstance(mesh, str) else mesh)
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
        deltas = self._deltas(self._request(prompt, sampling_params or SamplingParams()))
        next(deltas)  # empty: adds the request, so that a bad one is refused here
        return deltas

    def update_params(self, params: Params) -> None:
        """Swap the weights in place, shapes and layout kept; running streams go on under the new ones.

        params: as `jaxinfer.load_model(...).params`, nested dicts of arrays. ValueError where they do not fit.
        """
        self.engine.update_params(params)

    def _deltas(self, request: Request) -> Iterator[Delta]:
        count = request.sampling_params.n
        texts, tokens, ended = [0] * count, [0] * count, [False] * count
        output = self.engine.add_request(request)
        try:
            yield Delta(0, "", [], None, None, None)
            while True:  # other streams and `generate` may have made steps in between
                if output.error is not None:
                    raise RuntimeError(output.error)
                for i, completion in enumerate(output.outputs):
                    finish_reason, stop_reason = completion.finish_reason, completion.stop_reason
                    if ended[i] or (len(completion.token_ids) == tokens[i] and finish_reason is None):
                        continue
                    text, token_ids = completion.text[texts[i] :], completion.token_ids[tokens[i] :]
                    logprobs = None if completion.logprobs is None else completion.logprobs[tokens[i] :]
                    texts[i], tokens[i] = texts[i] + len(text), tokens[i] + len(token_ids)
                    ended[i] = finish_reason is not None
                    yield Delta(i, text, token_ids, logprobs, finish_reason, stop_reason)
                if all(ended):
                    return
                self.engine.step()
        finally:
            self.engine.abort(request.request_id)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        return make_request(self.engine, f"llm-{next(self._numbers)}", prompt, params)

    def _run(self, requests: Sequence[Request]) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        try:
            for request in requests:
                outputs.append(self.engine.add_request(request))
            for output in outputs:
                while not output.finished:
                    self.engine.step()
        finally:
            for output in outputs:
                if not output.finished:
                    self.engine.abort(output.request_id)
        return outputs


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts={prompts!r} must be text, token ids, or a list of these")
    several: list[Any] = list(prompts)
    return [several] if several and all(isinstance(item, numbers.Integral) for item in several) else several
