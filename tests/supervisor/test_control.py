"""The control socket: one JSON line each way, bounded, never blocking the supervisor's loop."""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.runtime import CONTROL_NAME
from supervisor import control
from supervisor.control import ControlServer, HubNotRunning, Refused, Request, ask


class Server:
    """A control server with its loop in a thread, as the arbiter would turn it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.answer: dict[str, Any] | None = None
        self.requests: list[Request] = []
        self._selector = selectors.PollSelector()
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self.server = ControlServer(self._fd, self._selector, self.handle)
        self._ending = False
        self._thread = threading.Thread(target=self._turn)
        self._thread.start()

    def handle(self, request: Request) -> Any:
        self.requests.append(request)
        if request.command == "scale":
            raise Refused("workers = 99: must be an integer from 1 to 64")
        if request.command == "stop":
            return lambda: None
        return (lambda: self.answer) if request.command == "reload" else {"ok": True, "state": "ready"}

    def _turn(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select(0.01):
                key.data(time.monotonic())
            self.server.advance(time.monotonic())

    def close(self) -> None:
        self._ending = True
        self._thread.join()
        self.server.close()
        self._selector.close()
        os.close(self._fd)

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        # Blocking, since a socket with a time-out does not wait for room in a full queue.
        client.connect(f"/proc/self/fd/{self._fd}/{CONTROL_NAME}")
        client.settimeout(10)
        return client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    # Deeper than the 107 bytes of a socket address.
    made = Server(tmp_path / ("d" * 100) / ("e" * 100))
    yield made
    made.close()


def test_an_answer_at_once(server: Server) -> None:
    assert ask(str(server.directory), {"command": "status"}, 10) == {"ok": True, "state": "ready"}
    assert server.requests == [Request(command="status")]


def test_an_answer_that_takes_time(server: Server) -> None:
    threading.Timer(0.1, lambda: setattr(server, "answer", {"ok": True, "workers": 2})).start()
    assert ask(str(server.directory), {"command": "reload"}, 10) == {"ok": True, "workers": 2}


def test_no_answer_in_time(server: Server) -> None:
    with pytest.raises(TimeoutError):
        ask(str(server.directory), {"command": "reload"}, 0.1)


def test_a_refusal(server: Server) -> None:
    answer = ask(str(server.directory), {"command": "scale", "workers": 99}, 10)
    assert answer == {"ok": False, "error": "workers = 99: must be an integer from 1 to 64"}


def test_the_end_of_the_hub_is_a_hang_up(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")
    threading.Timer(0.1, server.close).start()
    assert ask(str(server.directory), {"command": "stop"}, 10) is None


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(HubNotRunning, match=f"no hub is running in {tmp_path}"):
        ask(str(tmp_path), {"command": "status"}, 1)
    with pytest.raises(HubNotRunning):
        ask(str(tmp_path / "none"), {"command": "status"}, 1)


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"[]", b'{"command":"explode"}', b'{"command":"status","x":1}', b"\xff", b'"\xed\xa0\x80"'],
)
def test_nonsense_gets_an_error_and_hurts_nobody(server: Server, line: bytes) -> None:
    with server.connect() as client:
        client.sendall(line + b"\n")
        assert json.loads(client.recv(4096))["ok"] is False
    assert ask(str(server.directory), {"command": "status"}, 10)


def test_an_endless_line_is_cut_off(server: Server) -> None:
    with server.connect() as client:
        try:
            for _ in range(100):
                client.sendall(b"x" * 1024)
            assert client.recv(1) == b""
        except ConnectionError:
            pass
    assert ask(str(server.directory), {"command": "status"}, 10)


def test_silent_clients_are_dropped_and_more_than_a_few_wait(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "IDLE_TIMEOUT", 0.3)
    silent = [server.connect() for _ in range(control.MAX_CLIENTS + 2)]
    assert ask(str(server.directory), {"command": "status"}, 10)
    for client in silent:
        assert client.recv(1) == b""
        client.close()


def test_a_client_that_leaves_while_it_waits(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b'{"command":"reload"}\n')
    server.answer = {"ok": True}
    assert ask(str(server.directory), {"command": "status"}, 10)


def test_an_answer_larger_than_the_socket_takes(server: Server) -> None:
    server.answer = {"ok": True, "text": "x" * 1_000_000}
    assert ask(str(server.directory), {"command": "reload"}, 10) == server.answer


def test_mode(server: Server) -> None:
    assert os.stat(server.directory / CONTROL_NAME).st_mode & 0o077 == 0
