"""A worker for tests of the supervisor: plain sockets, no event loop, no bus; it starts in milliseconds.

Run as a program it is a whole hub with such workers: ``python -m tests.supervisor.fake_worker OPTIONS``. What they do
besides serving is told by files in the directory FAKE_DIR (see :func:`main`), so a test can change it while they run.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ipc.board import PeerKind, SlotState
from ipc.runtime import RuntimeDir
from workers.settings import Settings


class FakeWorker:
    """Accepts on its listener, says ``<index> <pid>`` to each connection, closes it, and obeys the supervisor."""

    def __init__(
        self, listener: socket.socket, index: int, control: socket.socket, runtime_dir: str, parent: int
    ) -> None:
        self.listener = listener
        self.index = index
        self.control = control
        self.parent = parent
        self.draining = False
        self.runtime, self.slot = RuntimeDir.join(runtime_dir, PeerKind.WORKER, listener=index)
        self.record = self.runtime.board.record(self.slot)
        self.record.state = SlotState.JOINING
        self.tell({"claimed": [self.slot, self.record.epoch]})

    def tell(self, line: dict[str, Any]) -> None:
        self.control.send(json.dumps(line).encode() + b"\n")

    def serve(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self.drain())
        self.record.state = SlotState.READY
        self.record.beat()
        self.tell({"ready": True})
        self.control.setblocking(True)
        while not self.draining:
            ready, _, _ = select.select([self.listener, self.control], [], [], 0.1)
            self.record.beat()
            if self.listener in ready:
                self.accept()
            if self.control in ready:
                line = self.control.recv(100)
                self.draining |= not line or line.startswith((b"drain", b"quit"))

    def accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except BlockingIOError:
            return
        connection.sendall(f"{self.index} {os.getpid()}".encode())
        connection.close()

    def drain(self) -> None:
        self.draining = True

    def close(self) -> None:
        self.record.state = SlotState.DRAINING
        self.listener.close()
        self.runtime.close()


def main(
    settings: Settings,
    *,
    listener: socket.socket,
    listener_index: int,
    control: socket.socket,
    runtime_dir: str,
    supervisor_pid: int,
    app: object | None = None,
) -> int:
    """The child's life. A file in FAKE_DIR makes it misbehave:

    ``exit``: end with the exit code in it before being ready; ``fail``: words of the failure, exit code 3;
    ``crash``: seconds from being ready to dying; ``hang``: never ready; ``deaf``: does not drain.
    """
    orders = Path(os.environ["FAKE_DIR"])
    if orders.exists():
        note(orders, listener_index)
    if (orders / "exit").exists():
        return int((orders / "exit").read_text())
    if (orders / "fail").exists():
        control.send(json.dumps({"failed": (orders / "fail").read_text()}).encode() + b"\n")
        return 3
    if (orders / "hang").exists():
        signal.pause()
    worker = FakeWorker(listener, listener_index, control, runtime_dir, supervisor_pid)
    if (orders / "crash").exists():
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, float((orders / "crash").read_text()))
    worker.serve()
    while (orders / "deaf").exists():
        worker.record.beat()
        time.sleep(0.05)
    worker.close()
    return 0


def note(orders: Path, index: int) -> None:
    """Write down what this process came with: the fork discipline is checked from it."""
    found = {
        "index": index,
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "time": time.monotonic(),
        "threads": threading.active_count(),
        "modules": [name for name in ("zmq", "asyncio", "lmdb", "uvloop", "uvicorn") if name in sys.modules],
        "descriptors": {name: _link(name) for name in os.listdir("/proc/self/fd")},
        "runtime_dir": os.environ["FLOCKWIRE_RUNTIME_DIR"],
        "ignored": [
            n
            for n in ("INT", "QUIT", "HUP")
            if signal.getsignal(getattr(signal, f"SIG{n}")) == signal.SIG_IGN
        ],
    }
    (orders / f"born.{os.getpid()}").write_text(json.dumps(found))


def _link(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        return "closed"


if __name__ == "__main__":
    from supervisor import flock
    from supervisor.cli import run
    from tests.supervisor import fake_worker

    flock._default_worker_main = lambda: fake_worker.main
    sys.exit(run(sys.argv[1:]))
