"""How processes find each other, and what is said of those that do not; links between threads, no jax."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from jaxinfer.distributed import group as groups
from jaxinfer.distributed.group import Place, find_place
from jaxinfer.distributed.link import Link, LinkError
from jaxinfer.flags import join_group
from jaxinfer.run import parser
from tests.distributed.process import free_port

ARRAYS = [np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros((0, 4), np.float32), np.array(2.5)]


def links() -> tuple[Link, Link]:
    first, second = socket.socketpair()
    first.close()
    second.close()
    with socket.create_server(("localhost", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return Link(client), Link(server.accept()[0])


def test_a_link_carries_values_and_arrays() -> None:
    here, there = links()
    here.send("step", {"arrays": ARRAYS, "number": 3, "nothing": None, "text": "grün"})
    message = there.receive()
    assert message.kind == "step"
    for sent, got in zip(ARRAYS, message.content["arrays"], strict=True):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert np.array_equal(got, sent)
    assert [message.content[name] for name in ("number", "nothing", "text")] == [3, None, "grün"]


def test_a_link_is_quick() -> None:
    """Two messages in a row must not wait for each other's acknowledgement, which takes 40 ms."""
    here, there = links()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        here.send("a", {"array": np.zeros(5000, np.int32)})
        here.send("b")
        there.receive()
        there.receive()
        times.append(time.perf_counter() - started)
    assert sorted(times)[10] < 0.02


def test_what_ends_a_link_is_said() -> None:
    here, there = links()
    here.close()
    with pytest.raises(LinkError, match="connection is closed"):
        there.receive()
    here, there = links()
    there.allow_silence(0.05)
    with pytest.raises(LinkError, match="nothing was heard"):
        there.receive()
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n" * 100, b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x01{"):
        here, there = links()
        here._socket.sendall(nonsense)
        with pytest.raises(LinkError, match="does not speak"):
            there.receive(4096)


def meet(*places: Place, seconds: float = 0.5) -> list[Future[Any]]:
    """All meet, each in a thread; ended futures."""
    with ThreadPoolExecutor(len(places)) as pool:

        def start(place: Place) -> Future[Any]:
            how: Callable[..., Any] = groups._report if place.process_id else groups._gather
            return pool.submit(how, place, time.monotonic() + seconds)

        return [start(place) for place in places]


def places(*numbers: int, count: int) -> list[Place]:
    port = free_port()
    return [Place("localhost", port, count, number) for number in numbers]


def test_processes_meet_in_any_order() -> None:
    found = [future.result() for future in meet(*places(2, 1, 0, count=3), seconds=20)]
    assert [sorted(peers) for peers, _ in found] == [[0], [0], [1, 2]]
    assert len({port for _, port in found}) == 1


def test_one_that_does_not_come_is_named() -> None:
    first, second = meet(*places(0, 2, count=4))
    with pytest.raises(ValueError, match=r"processes 1, 3 of 4 have not come to localhost:\d+; start every process"):
        first.result()
    with pytest.raises(ValueError, match=r"process 0 at localhost:\d+ says no: processes 1, 3 of 4 have not come"):
        second.result()


def test_process_0_that_does_not_answer_is_named() -> None:
    (only,) = meet(*places(1, count=2), seconds=0.2)
    with pytest.raises(
        ValueError, match=r"process 0 does not answer at localhost:\d+ \(Connection refused\); start it"
    ):
        only.result()


def test_those_that_do_not_belong_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = places(0, 1, 1, count=2)
    ended = meet(first, second, third, seconds=1)  # two with one number: one of them meets process 0
    assert [ended[0].exception(), *sorted(bool(future.exception()) for future in ended[1:])] == [None, False, True]
    first, other = places(0, 3, count=2)
    refused = meet(first, Place("localhost", first.port, 5, other.process_id))
    with pytest.raises(ValueError, match="process 3 of 5 is not one of process 0's 2"):
        refused[1].result()
    first, second = places(0, 1, count=2)
    told = threading.local()
    monkeypatch.setattr(groups, "_versions", lambda: told.__dict__.setdefault("own", f"jax {threading.get_ident()}"))
    refused = meet(first, second)
    with pytest.raises(ValueError, match=r"process 1 has jax \d+ and process 0 jax \d+; install the same"):
        refused[1].result()


def test_strangers_do_not_stop_a_meeting() -> None:
    first, second = places(0, 1, count=2)
    with ThreadPoolExecutor(1) as pool:
        gathering = pool.submit(groups._gather, first, time.monotonic() + 20)
        while True:
            try:
                stranger = socket.create_connection(("localhost", first.port))
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.close()
        groups._report(second, time.monotonic() + 20)
        assert list(gathering.result()[0]) == [1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--process-id 1", "--process-id needs --coordinator"),
        ("--num-processes 2", "--num-processes needs --coordinator"),
        ("--coordinator host:1234", "needs num_processes and process_id"),
        ("--coordinator host:1234 --num-processes 2", "needs num_processes and process_id"),
        ("--coordinator host --num-processes 2 --process-id 0", "is not HOST:PORT"),
        ("--coordinator host:0 --num-processes 2 --process-id 0", "is not HOST:PORT"),
        (
            "--coordinator h:1 --num-processes 2 --process-id 2",
            r"process_id=2 is out of range; use .*\[0, 1\]",
        ),
        ("--coordinator h:1 --num-processes 0 --process-id 0", "num_processes=0 must be at least 1"),
        ("--coordinator auto --process-id 0", "leave them out"),
        ("--coordinator auto", "knows no TPU pod, SLURM"),
    ],
)
def test_flags_that_are_no_place(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_group(parser().parse_args(flags.split()), status_when_lost=1)


def test_a_cluster_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "7", "NTASKS": "4", "PROCID": "2", "LOCALID": "0", "STEP_NODELIST": "n[3-6]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = find_place("auto", None, None)
    assert (place.host, place.num_processes, place.process_id, place.device_ids) == ("n3", 4, 2, [0])
    assert find_place("[::1]:80", 2, 1) == Place("::1", 80, 2, 1)
