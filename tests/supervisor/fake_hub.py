"""A real supervisor with fake workers, in a session of its own; nothing of it is left after the test."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from supervisor.control import HubNotRunning, ask
from tests.support import free_port, until

ROOT = Path(__file__).parent.parent.parent


class FakeHub:
    """``with FakeHub(tmp_path) as hub``; ``hub.orders`` is the directory that tells its workers what to do."""

    def __init__(self, base: Path, *options: str, workers: int = 2, port: int | None = None) -> None:
        self.base = base
        self.port = port or free_port()
        self.runtime_dir = str(base / "run")
        self.orders = base / "orders"
        self.orders.mkdir(exist_ok=True)
        self.log_path = base / "log"
        self.options = [
            *("--port", str(self.port), "--workers", str(workers), "--runtime-dir", self.runtime_dir),
            *options,
        ]
        self.workers = workers
        self.cwd = ROOT
        self.launcher: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> FakeHub:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("FLOCKWIRE_")}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.launcher, sys.executable, "-m", "tests.supervisor.fake_worker", *self.options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.cwd,
                env={**clean, "FAKE_DIR": str(self.orders), "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        return self

    def __enter__(self) -> FakeHub:
        self.start()
        try:
            self.wait_state("ready")
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            sys.stderr.write(f"--- log of the hub\n{self.log()}---\n")
        self.end()

    def end(self) -> None:
        assert self.process is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(10)
        until(lambda: not self.group(), 10, "the end of the hub's process group")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def wait(self, timeout: float = 20.0) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    def has_ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_log(self, words: str, times: int = 1, timeout: float = 20.0) -> None:
        until(lambda: self.log().count(words) >= times, timeout, f"{times} x {words!r} in the log")

    def status(self) -> dict[str, Any]:
        answer = ask(self.runtime_dir, {"command": "status"}, 10)
        assert answer is not None
        return answer

    def wait_state(self, state: str, timeout: float = 20.0) -> dict[str, Any]:
        return self.wait_status(lambda status: status["state"] == state, timeout, f"state {state}")

    def wait_status(self, predicate: Any, timeout: float = 20.0, what: str = "the status") -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            assert self.process is not None
            assert self.process.poll() is None, f"the hub ended with {self.process.returncode}:\n{self.log()}"
            try:
                status = self.status()
            except HubNotRunning:
                return None
            return status if predicate(status) else None

        found = until(look, timeout, what)
        assert found is not None
        return found

    def pids(self) -> dict[int, int]:
        """The ready workers: listener index and pid."""
        return {w["listener"]: w["pid"] for w in self.status()["workers"] if w["state"] == "ready"}

    def born(self) -> list[dict[str, Any]]:
        """What every worker that was ever forked has noted of itself, in order."""
        notes = [json.loads(path.read_text()) for path in self.orders.glob("born.*")]
        return sorted(notes, key=lambda note: note["time"])

    def group(self) -> list[int]:
        """The living processes of the hub's process group; zombies too."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                try:
                    if os.getpgid(int(name)) == self.pid:
                        found.append(int(name))
                except ProcessLookupError:
                    pass
        return found

    def ask_worker(self, timeout: float = 10.0) -> tuple[int, int]:
        """Connect; the listener index and pid of the worker that answers."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            index, pid = connection.recv(100).split()
            return int(index), int(pid)
