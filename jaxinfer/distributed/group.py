"""Processes that run one model together: how they meet, tell each other what to do, and end. Imports no jax at load.

Process 0 leads. Every other process has a link to it, and none to each other. They meet over these links before jax is
started, so that one that does not come is known by its number, and one that goes is noticed from the first moment on.
Whoever loses the link to process 0, or is told by it of another's loss, ends at once: a thread of its own listens, and
leaves by os._exit, since the main thread may be waiting in a collective for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from types import FrameType
from typing import Any, NoReturn

from jaxinfer.distributed.link import SILENCE_SECONDS, Link, LinkError, Message

log = logging.getLogger(__name__)

AUTO = "auto"
# How long processes wait for each other to be started: as long as jax does.
MEETING_SECONDS = 300.0
_BEAT_SECONDS = 2.0
_HELLO_SECONDS = 5.0
_FAREWELL_SECONDS = 5.0
_MAX_HELLO_BYTES = 4096
# A collective that fails and the link that tells whose fault it was are heard in any order, at about the same time.
SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Place:
    """A process's place in a group. device_ids: its devices, where a cluster gives each process some of a host's."""

    host: str
    port: int
    num_processes: int
    process_id: int
    device_ids: Any = None


@dataclass
class _Peer:
    """A process at the other end of a link. is_gone: it has said farewell, or was lost."""

    name: str
    link: Link
    is_gone: threading.Event = field(default_factory=threading.Event)


def find_place(coordinator: str, num_processes: int | None, process_id: int | None) -> Place:
    """ValueError, in a line, for what is not a place in a group."""
    device_ids = None
    if coordinator == AUTO:
        if num_processes is not None or process_id is not None:
            raise ValueError("coordinator=auto finds num_processes and process_id itself; leave them out")
        coordinator, num_processes, process_id, device_ids = _detected()
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator={coordinator!r} is not HOST:PORT of process 0, or auto")
    if num_processes is None or process_id is None:
        raise ValueError(f"coordinator={coordinator} needs num_processes and process_id as well")
    if num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id} is out of range; use a value in [0, {num_processes - 1}]")
    return Place(host.strip("[]"), int(port), num_processes, process_id, device_ids)


def _detected() -> tuple[str, int, int, Any]:
    from jaxinfer.compat import detect_cluster

    coordinator, num_processes, process_id, device_ids = detect_cluster(int(MEETING_SECONDS))
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "coordinator=auto: jax knows no TPU pod, SLURM, Kubernetes or Open MPI here; "
            "give HOST:PORT, num_processes and process_id"
        )
    return coordinator, num_processes, process_id, device_ids


_current: Group | None = None


def current() -> Group | None:
    """The group this process is in."""
    return _current


def join(
    coordinator: str,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    meeting_seconds: float = MEETING_SECONDS,
    status_when_lost: int = 1,
) -> Group:
    """See jaxinfer.distributed.join. status_when_lost: exit status of a process that ends since another is lost."""
    global _current
    if _current is not None:
        raise ValueError("this process is in a group already; join once")
    place = find_place(coordinator, num_processes, process_id)
    meet = _gather if place.process_id == 0 else _report
    peers, port = meet(place, time.monotonic() + meeting_seconds)
    group = _current = Group(place, peers, status_when_lost)
    try:
        _start_jax(place, port, int(meeting_seconds))
        atexit.register(group._at_exit)  # after jax's own, so that it runs before them
    except ValueError as error:
        group.leave(status_when_lost, str(error))
        raise
    log.info("process %d of %d, coordinated by %s", place.process_id, place.num_processes, _address(place))
    return group


def _start_jax(place: Place, port: int, timeout_seconds: int) -> None:
    import jax

    if jax.distributed.is_initialized():
        raise ValueError("jax.distributed is initialised already; leave that to jaxinfer.distributed.join")
    if place.num_processes > 1:
        _start_jax_service(place, port, timeout_seconds)
    try:
        jax.devices()  # which waits for everyone's
    except (RuntimeError, AssertionError) as error:  # what jax raises depends on how the platform is missing
        raise ValueError(f"jax has no device for JAX_PLATFORMS={jax.config.jax_platforms!r} ({error})") from error


def _start_jax_service(place: Place, port: int, timeout_seconds: int) -> None:
    import jax

    # It would take SIGTERM for itself, which stops a job or drains a server.
    jax.config.update("jax_enable_preemption_service", False)
    host = f"[{place.host}]" if ":" in place.host else place.host
    try:
        jax.distributed.initialize(
            f"{host}:{port}",
            place.num_processes,
            place.process_id,
            local_device_ids=place.device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout_seconds,
            coordinator_bind_address=f"{host}:{port}" if _is_loopback(place.host) else None,
        )
    except RuntimeError as error:
        raise ValueError(f"jax.distributed did not start: {str(error).splitlines()[0]}") from error


class Group:
    """This process's part in a group; process 0 tells, the others do as they are told.

    on_asked: called in a thread of its own, on process 0, where another process was sent a signal that asks it to stop.
    """

    def __init__(self, place: Place, peers: Mapping[int, _Peer], status_when_lost: int) -> None:
        self.process_id = place.process_id
        self.num_processes = place.num_processes
        self.on_asked: Callable[[], object] = _ask_this_process
        self._peers = peers
        self._status_when_lost = status_when_lost
        self._commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_over = False  # peers may go
        self._ending = threading.Lock()
        self._exit_status: int | None = None  # set where jax's own farewell would wait for processes that are gone
        for peer in peers.values():
            threading.Thread(target=self._listen, args=(peer,), name=f"link to {peer.name}", daemon=True).start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
        else:
            self.leave(1, type(error).__name__ if not str(error) else str(error))

    def tell(self, kind: str, content: Any = None) -> None:
        """Process 0: a command to all others, which does not wait for them."""
        assert self.process_id == 0
        for peer in self._peers.values():
            try:
                peer.link.send(kind, content)
            except LinkError as error:
                self._end(f"{peer.name} is lost: {error}")

    def wait_for_all(self) -> None:
        """Process 0: until the others have done all that they were told."""
        self.tell("report")
        for _ in self._peers:
            self._reports.get()

    def next_answer(self) -> Any:
        """Process 0: wait for what another process answers next."""
        return self._answers.get()

    def answer(self, content: Any) -> None:
        """Other processes, in any thread: what process 0 waits for."""
        try:
            self._leader.link.send("answer", content)
        except LinkError as error:
            self._end(f"{self._leader.name} is lost: {error}")

    def next_command(self) -> Message | None:
        """Other processes: wait for what process 0 asks for. None once it has closed the group."""
        assert self.process_id != 0
        while (command := self._commands.get()).kind == "report":
            self._leader.link.send("done")
        if command.kind != "close":
            return command
        _shut_down_jax()
        with contextlib.suppress(LinkError):
            self._leader.link.send("farewell")
        return None

    def close(self, status: int = 0) -> None:
        """End the group in good order, all with exit status 0; with another at once, this process included."""
        if status:
            self.leave(status)
            _end_now(status)
        if self._is_over:
            return
        if self.process_id:
            self.leave(self._status_when_lost, "it left the group")
        self.tell("close")
        _shut_down_jax()  # waits for all
        self._is_over = True

    def leave(self, status: int, reason: str = "") -> None:
        """End the group at once, in the middle of whatever is done: everywhere with this exit status.

        The caller's part is to come to its own end; on other processes than 0 this does not return.
        """
        if self.process_id:
            time.sleep(SETTLE_SECONDS)  # if this is another's fault, process 0 knows
            with contextlib.suppress(LinkError):
                self._leader.link.send("failed", reason)
            self._exit(status, f"error: {reason}")
        if self._is_over:
            return
        self._is_over = True
        self._exit_status = status
        for peer in self._peers.values():
            with contextlib.suppress(LinkError):
                peer.link.send("leave", [status, reason])
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for peer in self._peers.values():
            peer.is_gone.wait(max(0.0, deadline - time.monotonic()))

    @property
    def _leader(self) -> _Peer:
        return self._peers[0]

    def _beat(self) -> None:
        while not self._is_over:
            for peer in self._peers.values():
                with contextlib.suppress(LinkError):  # whoever listens there hears of it too
                    peer.link.send("beat")
            time.sleep(_BEAT_SECONDS)

    def _listen(self, peer: _Peer) -> None:
        try:
            while (message := peer.link.receive()).kind != "farewell":
                self._hear(peer, message)
        except LinkError as error:
            if not self._is_over:
                self._end(f"{peer.name} is lost: {error}")
        peer.is_gone.set()

    def _hear(self, peer: _Peer, message: Message) -> None:
        if message.kind == "beat":
            return
        if message.kind == "failed":
            self._end(f"{peer.name} failed: {message.content}")
        elif message.kind == "answer":
            self._answers.put(message.content)
        elif message.kind == "done":
            self._reports.put(peer.name)
        elif message.kind == "ask":
            _say(f"{peer.name} was asked to stop ({message.content})")
            # Whoever asked may have asked every process; this one is then ending already.
            later = threading.Timer(SETTLE_SECONDS, lambda: self._is_over or self.on_asked())
            later.daemon = True
            later.start()
        elif message.kind == "lost":
            self._exit(self._status_when_lost, f"error: {message.content}")
        elif message.kind == "leave":
            status, reason = message.content
            why = f": {reason}" if reason else ""
            self._exit(status, f"process 0 has ended with exit status {status}{why}" if status else None)
        else:
            self._is_over = self._is_over or message.kind == "close"
            self._commands.put(message)

    def _end(self, reason: str) -> NoReturn:
        """Another process is lost: tell the rest, and go."""
        reason = f"{reason}; nothing can go on without it, start all processes again"
        if self.process_id == 0 and self._ending.acquire(blocking=False):
            for peer in self._peers.values():
                with contextlib.suppress(LinkError):
                    peer.link.send("lost", reason)
                peer.link.finish()
            _say(f"error: {reason}")
            time.sleep(0.1)  # for what was sent, before the kernel ends the connections
            os._exit(self._status_when_lost)
        self._exit(self._status_when_lost, f"error: {reason}")

    def _exit(self, status: int, line: str | None) -> NoReturn:
        """Without the interpreter's own farewell, which waits for threads and for the other processes."""
        self._ending.acquire()  # a second thread waits here for the end
        if line:
            _say(line)
        os._exit(status)

    def _at_exit(self) -> None:
        if not self._is_over:
            self.leave(self._status_when_lost, f"process {self.process_id} has not closed the group")
        if self._exit_status is not None:
            _end_now(self._exit_status)

    @contextlib.contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C go to process 0, which ends all in good order; a second one ends this process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asked = False

        def ask(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            if asked:
                os._exit(128 + number)
            asked = True
            self._leader.link.send("ask", signal.Signals(number).name)

        previous = [(number, signal.signal(number, ask)) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            yield
        finally:
            for number, handler in previous:
                signal.signal(number, handler)


def _end_now(status: int) -> NoReturn:
    """Without jax's own farewell, which waits for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _ask_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _shut_down_jax() -> None:
    import jax

    jax.distributed.shutdown()


def _say(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr, flush=True)


# How they meet: each process says hello to process 0, and gets a welcome once all are there.


def _gather(place: Place, deadline: float) -> tuple[dict[int, _Peer], int]:
    """Process 0: the others by number, and the port that jax shall have."""
    peers: dict[int, _Peer] = {}
    with _listener(place) as listener:
        listener.settimeout(1.0)
        while len(peers) < place.num_processes - 1:
            if time.monotonic() > deadline:
                missing = [str(i) for i in range(1, place.num_processes) if i not in peers]
                who, are = ("process", "has") if len(missing) == 1 else ("processes", "have")
                reason = f"{who} {', '.join(missing)} of {place.num_processes} {are} not come to {_address(place)}"
                for peer in peers.values():
                    with contextlib.suppress(LinkError):
                        peer.link.send("refused", reason)
                raise ValueError(f"{reason}; start every process with the same coordinator and a number of its own")
            with contextlib.suppress(TimeoutError):
                connection, address = listener.accept()
                _welcome(place, Link(connection, _HELLO_SECONDS), address[0], peers)
    port = _free_port()
    for peer in peers.values():
        peer.link.allow_silence(SILENCE_SECONDS)
        with contextlib.suppress(LinkError):  # whoever listens hears of it
            peer.link.send("welcome", port)
    return peers, port


def _welcome(place: Place, link: Link, address: str, peers: dict[int, _Peer]) -> None:
    """Take a process in that says hello, or say why not. Strangers are left standing."""
    try:
        message = link.receive(_MAX_HELLO_BYTES)
        if message.kind != "hello":
            raise LinkError("does not speak as jaxinfer does")
        number, count, host, versions = message.content
        if count != place.num_processes or not 0 < number < count:
            refusal = f"process {number} of {count} is not one of process 0's {place.num_processes}"
        elif number in peers:
            refusal = f"{peers[number].name} is there already; give every process a number of its own"
        elif versions != _versions():
            refusal = f"process {number} has {versions} and process 0 {_versions()}; install the same"
        else:
            peers[number] = _Peer(f"process {number} on {host}", link)
            return
        link.send("refused", refusal)
        log.warning("%s was sent away: %s", address, refusal)
    except (LinkError, ValueError, TypeError) as error:
        log.warning("%s was sent away: it %s", address, error)
    link.close()


def _report(place: Place, deadline: float) -> tuple[dict[int, _Peer], int]:
    """Another process than 0: process 0, once all are there, and the port that jax has."""
    while True:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=_HELLO_SECONDS)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"process 0 does not answer at {_address(place)} ({error.strerror or error}); "
                    "start it, or check the coordinator"
                ) from error
            time.sleep(0.2)
    # Process 0 gives up first, and says for whom it waited.
    link = Link(connection, max(0.0, deadline - time.monotonic()) + 2 * SILENCE_SECONDS)
    try:
        link.send("hello", [place.process_id, place.num_processes, socket.gethostname(), _versions()])
        message = link.receive()
    except LinkError as error:
        raise ValueError(f"process 0 at {_address(place)} is lost: {error}; start all processes again") from error
    if message.kind != "welcome":
        raise ValueError(f"process 0 at {_address(place)} says no: {message.content}")
    link.allow_silence(SILENCE_SECONDS)
    return {0: _Peer(f"process 0 at {_address(place)}", link)}, message.content


def _listener(place: Place) -> socket.socket:
    try:
        if _is_loopback(place.host):
            return socket.create_server((place.host, place.port))
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", place.port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", place.port))
    except OSError as error:
        raise ValueError(f"cannot listen on port {place.port}: {error.strerror}; choose another") from error


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _address(place: Place) -> str:
    return f"{place.host}:{place.port}"


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib"))
