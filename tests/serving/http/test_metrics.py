"""What Prometheus and the log are told, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxinfer.engine import Engine
from jaxinfer.metrics import Distribution
from serving.client import AsyncClient
from serving.logs import JsonFormatter, PlainFormatter
from serving.metrics import _TIME_BOUNDS, _TOKEN_BOUNDS, _cumulative
from serving.refusals import Refusals
from serving.security import Tokens
from serving.settings import Limits
from tests.serving.harness import address, refused, run, serving
from tests.serving.http.harness import GREEDY, http_serving

DASHBOARD = Path(__file__).parents[3] / "examples" / "grafana.json"
VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:cache_config_info",
}


async def _samples(client: httpx.AsyncClient) -> dict[str, dict[Any, float]]:
    """Value by labels (without the model's) by name."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[Any, float]] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found


def _difference(after: dict[str, Any], before: dict[str, Any], name: str, *labels: str) -> float:
    return after[f"jaxinfer_{name}"].get(labels, 0) - before.get(f"jaxinfer_{name}", {}).get(labels, 0)


def test_both_protocols_are_counted(engine: Engine) -> None:
    async def scenario() -> None:
        async with http_serving(engine, vllm_metrics=True) as (server, web), AsyncClient(address(server)) as rpc:
            before = await _samples(web)
            await rpc.generate("a prompt", max_tokens=5, temperature=0, ignore_eos=True)
            body = {**GREEDY, "prompt": "another", "max_tokens": 7}
            assert (await web.post("/v1/completions", json=body)).status_code == 200
            assert (await web.post("/v1/completions", json={**body, "top_p": 2})).status_code == 400
            assert (await web.post("/v1/completions", json={**body, "model": "big"})).status_code == 404
            assert (await web.post("/v1/completions", json={**body, "prompt": [96]})).status_code == 400
            await refused(rpc.generate("x", top_p=2), "INVALID_ARGUMENT")
            await refused(rpc.generate("x", n=64), "INVALID_ARGUMENT")
            after = await _samples(web)
            for name, labels, expected in (
                ("prompt_tokens_total", (), len("a prompt") + len("another")),
                ("generation_tokens_total", (), 12),
                ("requests_finished_total", ("length",), 2),
                ("requests_rejected_total", ("invalid_argument",), 4),
                ("requests_rejected_total", ("not_found",), 1),
                ("time_to_first_token_seconds_count", (), 2),
                ("inter_token_latency_seconds_count", (), 4 + 6),
                ("request_queue_time_seconds_count", (), 2),
                ("request_prefill_time_seconds_count", (), 2),
                ("request_decode_time_seconds_count", (), 2),
                ("e2e_request_latency_seconds_count", (), 2),
                ("request_generation_tokens_sum", (), 12),
                ("compilations_total", (), 0),
            ):
                assert _difference(after, before, name, *labels) == expected, name
            parts = [f"request_{part}_time_seconds_sum" for part in ("queue", "prefill", "decode")]
            total = _difference(after, before, "e2e_request_latency_seconds_sum")
            assert sum(_difference(after, before, part) for part in parts) == pytest.approx(total, rel=1e-6)
            assert _difference(after, before, "steps_total") > 6
            assert after["jaxinfer_healthy"][()] == 1
            assert after["jaxinfer_num_requests_running"][()] == after["jaxinfer_num_requests_waiting"][()] == 0
            assert not VLLM - after.keys()
            assert after["vllm:generation_tokens_total"] == after["jaxinfer_generation_tokens_total"]
        async with http_serving(engine) as (_, web):
            names = (await _samples(web)).keys()
            assert not [name for name in names if name.startswith("vllm")]
            assert "process_open_fds" in names

    run(scenario())


@pytest.mark.parametrize("bounds", [_TIME_BOUNDS, _TOKEN_BOUNDS])
def test_bounds_count_what_is_below_them(bounds: tuple[float, ...]) -> None:
    rng = random.Random(1)
    values = [10 ** rng.uniform(-6, 7) for _ in range(5000)]
    distribution = Distribution()
    distribution.extend(values)
    counted = _cumulative(distribution.stats(exact=False), bounds)
    for bound, (_, count) in zip(bounds, counted, strict=False):
        assert count == sum(value <= bound for value in values)
    assert counted[-1] == ("+Inf", 5000)
    assert [float(text) for text, _ in counted[:-1]] == pytest.approx(bounds, rel=1e-3)
    assert [count for _, count in _cumulative(Distribution().stats(), bounds)] == [0] * (len(bounds) + 1)


def test_the_dashboard_asks_for_what_exists(engine: Engine) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 10
    asked = {name for query in queries for name in re.findall(r"\b(?:jaxinfer|process|vllm)[a-z0-9_:]*", query)}

    async def scenario() -> None:
        async with http_serving(engine) as (_, web):
            body = {**GREEDY, "prompt": "x", "max_tokens": 2}
            assert (await web.post("/v1/completions", json=body)).status_code == 200
            assert (await web.post("/v1/completions", json={**body, "n": 0})).status_code == 400
            assert not asked - (await _samples(web)).keys()

    run(scenario())


def test_what_is_refused_is_counted_and_logged(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Of each reason one line for now, and no secret in any."""
    good, wrong, media = "a-token-of-some-length", "some-other-length-of-token", {"content-type": "application/json"}

    async def scenario() -> None:
        config = {"limits": Limits(max_message_bytes=1024), "tokens": Tokens([good])}
        async with http_serving(engine, **config) as (server, web), AsyncClient(address(server), token=wrong) as rpc:
            for _ in range(3):
                bad = {"authorization": f"Bearer {wrong}"}
                assert (await web.get(f"/v1/models?key={wrong}", headers=bad)).status_code == 401
            await refused(rpc.generate("x"), "UNAUTHENTICATED")
            web.headers["authorization"] = f"Bearer {good}"
            assert (await web.post("/v1/completions", content=b" " * 2000, headers=media)).status_code == 413
            assert (await web.post("/tokenize", content=b"x")).status_code == 415
            assert (await web.post("/v1/completions", json={"prompt": 5})).status_code == 400
            assert (await web.post("/tokenize", json={"prompt": 5})).status_code == 400
            assert (await web.post("/detokenize", json={"tokens": [5], "skip_special_tokens": None})).status_code == 200
            unreadable = rpc._channel.unary_unary("/jaxinfer.v1.Inference/Generate")
            await refused(
                unreadable(b"\xff", metadata=[("authorization", f"Bearer {good}")]),
                "INVALID_ARGUMENT",
                "cannot be read",
            )
            counts = (await _samples(web))["jaxinfer_requests_rejected_total"]
            reasons = {"unauthenticated": 4, "body_too_large": 1, "unsupported_media_type": 1, "invalid_argument": 3}
            assert counts == {(reason,): count for reason, count in reasons.items()}

    with caplog.at_level(logging.INFO, logger="serving"):
        run(scenario())
    lines = [PlainFormatter().format(record) for record in caplog.records if record.message == "refused"]
    for words in (
        'error="send one of the server\'s tokens: authorization: Bearer TOKEN" caller="127.0.0.1:',
        'call="GET /v1/models"',
        'reason="body_too_large" error="the body is larger than 1024 bytes; send less"',
        'reason="unsupported_media_type"',
        'reason="invalid_argument"',
    ):
        assert sum(words in line for line in lines) == 1, lines
    assert not [line for line in lines if wrong in line or good in line]


def test_a_flood_of_refusals_is_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serving.refusals.time.monotonic", lambda: now)
    refusals = Refusals()
    with caplog.at_level(logging.INFO, logger="serving"):
        for _ in range(5):
            refusals.note("INTERNAL", "x" * 1000, caller="somebody")
        refusals.note("ABORTED", "another")
        now += 1.5
        refusals.note("INTERNAL", "again")
    assert refusals.counts == {"INTERNAL": 6, "ABORTED": 1}
    first, other, again = (record.fields for record in caplog.records)  # pyright: ignore[reportAttributeAccessIssue]
    assert first == {"reason": "internal", "error": "x" * 200, "caller": "somebody"}
    assert other == {"reason": "aborted", "error": "another"}
    assert again == {"reason": "internal", "error": "again", "unlogged": 4}


def test_a_line_for_each_request(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with http_serving(engine) as (server, web), AsyncClient(address(server)) as rpc:
            await rpc.generate("a prompt", max_tokens=2, ignore_eos=True, request_id='rpc"\nERROR forged')
            body = {**GREEDY, "prompt": "another", "max_tokens": 3, "n": 2}
            response = await web.post("/v1/completions", json=body, headers={"x-request-id": "web-1"})
            assert response.headers["x-request-id"] == "web-1"
            assert response.json()["id"] == "cmpl-web-1"
            assert (await web.post("/v1/completions", json={**body, "request_id": "web-2", "prompt": [96]})).is_error

    with caplog.at_level(logging.INFO, logger="serving"):
        run(scenario())
    records = [record for record in caplog.records if hasattr(record, "fields")]
    first, second, third = (record.fields for record in records if record.message == "request")  # pyright: ignore[reportAttributeAccessIssue]
    assert (first["request_id"], first["prompt_tokens"], first["completion_tokens"]) == ('rpc"\nERROR forged', 8, 2)
    assert (second["request_id"], second["model"], second["finish"]) == ("web-1", "small", "length,length")
    assert second["completion_tokens"] == 6
    assert 0 <= second["queue"] <= second["ttft"] <= second["total"]
    assert (third["request_id"], third["status"]) == ("web-2", "INVALID_ARGUMENT")
    plain = PlainFormatter().format(records[0])
    assert 'request request_id="rpc\\"\\nERROR forged" model="small" prompt_tokens=8' in plain
    assert "\n" not in plain
    line = json.loads(JsonFormatter().format(records[1]))
    assert line["message"] == "request"
    assert (line["request_id"], line["level"]) == ("web-1", "INFO")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_a_client_that_left_is_no_error(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """gRPC calls it one when it answers a call that is gone."""
    grpcs = logging.getLogger("grpc._cython.cygrpc")

    async def scenario() -> None:
        async with serving(engine):
            grpcs.error("ExecuteBatchError raised in core by servicer method [/jaxinfer.v1.Inference/Generate]")
            grpcs.warning("what else it says")

    run(scenario())
    assert [record.message for record in caplog.records if record.name == grpcs.name] == ["what else it says"]
