"""The servers that are measured, ours and the peers: how each is started, found, spoken to and stopped."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import proc
from bench.build import NoCompiler, build
from bench.install_peers import DEBIAN, NODE, VENV
from bench.places import HERE, ROOT

START_DEADLINE = 30.0
STOP_DEADLINE = 10.0


class Missing(RuntimeError):
    """The server cannot run here; the words say what is not installed."""


class DidNotStart(RuntimeError):
    """The server ended or did not answer in time; the words hold the end of its log."""


@dataclass(frozen=True)
class Dialect:
    """How the load generator speaks to a server: options for hub scenarios, for rooms, and for an echo."""

    hub: tuple[str, ...] = ("--path", "/ws")
    rooms: tuple[str, ...] = ("--path", "/ws")
    echo: tuple[str, ...] | None = ("--path", "/echo", "--dialect", "raw")


PLAIN = Dialect()
ACKNOWLEDGED = Dialect(
    hub=("--path", "/ws", "--ack"), rooms=("--path", "/ws", "--ack"), echo=("--path", "/ws", "--ack")
)
"""flockwire: subscriptions are confirmed, and the hub's echo is a topic of one's own."""
ECHO_ONLY = Dialect(hub=(), rooms=())
NCHAN = Dialect(
    hub=("--path", "/sub/%t", "--publish-path", "/pub/%t", "--dialect", "nchan"),
    rooms=("--path", "/both/%t", "--dialect", "nchan"),
    echo=("--path", "/both/%t", "--dialect", "nchan"),
)
_SOCKETIO = ("--path", "/socket.io/?EIO=4&transport=websocket", "--dialect", "socketio")
SOCKETIO = Dialect(hub=_SOCKETIO, rooms=_SOCKETIO, echo=(*_SOCKETIO, "--event", "echo"))


@dataclass(frozen=True)
class Commands:
    """What a server needs to run: command lines (the first one listens), and variables."""

    lines: Sequence[Sequence[str]]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """A server by name. ``commands(port, directory)`` raises :class:`Missing` when it is not installed."""

    name: str
    title: str
    commands: Callable[[int, Path], Commands]
    dialect: Dialect = PLAIN
    ready_path: str | None = None
    processes: int = 1
    """So many are running when it is ready; an nginx listens before its workers are there."""
    whole: Callable[[int, Path], bool] | None = None
    """Asked with port and directory: all of it serves, not only the first worker that answered."""
    resident: bool = True
    """False: it costs processor time while idle and so is stopped after each of its turns."""


class Running:
    """A started server: its port, its processes, its end."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="flockwire-bench-"))
        self.log = self.directory / "log"
        self.processes: list[subprocess.Popen[bytes]] = []
        raise_descriptors()
        try:
            commands = spec.commands(self.port, self.directory)
            environ = {**os.environ, **commands.environ, "PYTHONPATH": str(ROOT)}
            with self.log.open("wb") as log:
                for line in reversed(commands.lines):
                    # Its own session: an interrupt at the terminal reaches us, and we stop it in order.
                    process = subprocess.Popen(
                        line, cwd=self.directory, env=environ, stdout=log, stderr=log, start_new_session=True
                    )
                    self.processes.append(process)
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_DEADLINE
        while not self._ready():
            if any(process.poll() is not None for process in self.processes) or time.monotonic() > deadline:
                raise DidNotStart(f"{self.spec.name} did not start: {self.log_end()}")
            time.sleep(0.02)

    def _ready(self) -> bool:
        spec = self.spec
        return (
            answers(self.port, spec.ready_path)
            and len(self.pids()) >= spec.processes
            and (spec.whole is None or spec.whole(self.port, self.directory))
        )

    def log_end(self) -> str:
        """The last lines of what it printed."""
        with contextlib.suppress(FileNotFoundError):
            return (
                " / ".join(self.log.read_text(errors="replace").strip().splitlines()[-5:])
                or "it printed nothing"
            )
        return "it printed nothing"

    def pids(self) -> list[int]:
        """All its processes."""
        return proc.tree(process.pid for process in self.processes)

    def target(self) -> list[str]:
        """The generator's options that lead here."""
        return ["--port", str(self.port), "--pids", ",".join(map(str, self.pids()))]

    def stop(self) -> None:
        """Ask all to end, then make them; nothing of it stays."""
        everyone = self.pids()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_DEADLINE
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for pid in proc.tree(everyone):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def raise_descriptors() -> None:
    """Servers inherit the limit of descriptors: 10,000 connections need more than the usual soft one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def free_port(first: int | None = None) -> int:
    """A port of 127.0.0.1 below the ephemeral range, so that no connection of a run can hold it."""
    for port in range(first or 17000 + os.getpid() % 5000, 32000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise OSError("no free port below 32000")


def answers(port: int, path: str | None) -> bool:
    """Whether the server accepts connections and, given a path, says 200 there."""
    try:
        if path is None:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        return False


# --- ours ---


def flockwire(workers: int, *options: str) -> Callable[[int, Path], Commands]:
    """The supervisor with so many workers, in a runtime directory of its own."""

    def commands(port: int, directory: Path) -> Commands:
        line = [sys.executable, "-m", "supervisor", "--workers", str(workers), "--port", str(port)]
        where = ["--runtime-dir", str(runtime_dir(port, directory))]
        return Commands([[*line, *where, "--log-level", "warning", *options]])

    return commands


def runtime_dir(port: int, directory: Path) -> Path:
    """Where our server of that port and directory keeps its shared state: in shared memory, as by default."""
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else directory) / f"flockwire-bench-{os.getuid()}-{port}"


def all_workers_ready(port: int, directory: Path) -> bool:
    """Our supervisor steers connections to ready workers only: before all are, they come to the first alone."""
    from supervisor.control import HubNotRunning, ask  # the peers are measured without our packages

    try:
        answer = ask(str(runtime_dir(port, directory)), {"command": "status"}, START_DEADLINE)
    except (HubNotRunning, TimeoutError):
        return False
    return answer is not None and all(worker["state"] == "ready" for worker in answer["workers"])


# --- peers ---


def peer_python() -> str:
    """The interpreter of the peers' environment."""
    python = VENV / "bin" / "python"
    if not python.exists():
        raise Missing("not installed; `make bench-peers` does it")
    return str(python)


def peer_module(script: str, module: str) -> Callable[[int, Path], Commands]:
    """A Python peer that needs ``module`` in the peers' environment."""

    def commands(port: int, _directory: Path) -> Commands:
        python = peer_python()
        if not any(VENV.glob(f"lib/python*/site-packages/{module}*")):
            raise Missing(f"{module} is not installed; `make bench-peers` does it")
        return Commands([[python, str(HERE / "peers" / script), str(port)]])

    return commands


def uvicorn_loop(port: int, _directory: Path) -> Commands:
    """Plain uvicorn and Starlette, which we have ourselves."""
    return Commands([[sys.executable, str(HERE / "peers" / "uvicorn_loop.py"), str(port)]])


def own_redis(port: int) -> tuple[str, list[str]]:
    """Address and command line of a Redis that keeps nothing on disk."""
    found = free_port(port + 1)
    line = [find_program("redis-server"), "--port", str(found), "--bind", "127.0.0.1"]
    return f"redis://127.0.0.1:{found}", [*line, "--save", "", "--appendonly", "no"]


def uvicorn_redis(port: int, _directory: Path) -> Commands:
    """Plain uvicorn with Redis in between."""
    if importlib.util.find_spec("redis") is None:
        raise Missing("redis (the Python package) is not installed")
    url, redis = own_redis(port)
    return Commands([[sys.executable, str(HERE / "peers" / "uvicorn_redis.py"), str(port), url], redis])


def original(port: int, directory: Path) -> Commands:
    """The original library and a Redis of its own."""
    app = peer_module("original_app.py", "distributed_websocket")(port, directory).lines[0]
    url, redis = own_redis(port)
    # Every publish under way takes a connection, and redis-py refuses more than a hundred unless told.
    return Commands([[*app, f"{url}?max_connections=9000"], redis])


def find_program(name: str) -> str:
    """A program of the system or of the unpacked Debian packages."""
    for candidate in (shutil.which(name), DEBIAN / "usr/sbin" / name, DEBIAN / "usr/bin" / name):
        if candidate and Path(candidate).exists():
            return str(candidate)
    raise Missing(f"{name} is not installed; `make bench-peers` does it")


def bun(port: int, _directory: Path) -> Commands:
    """Bun with its own publish and subscribe."""
    program = NODE / "node_modules" / ".bin" / "bun"
    if not program.exists():
        raise Missing("bun is not installed; `make bench-peers` does it")
    return Commands([[str(program), str(HERE / "peers" / "bun_hub.js"), str(port)]])


def socketio(port: int, _directory: Path) -> Commands:
    """Socket.IO, two workers under Node's cluster."""
    node = shutil.which("node")
    if node is None or not (NODE / "node_modules" / "socket.io").exists():
        raise Missing("node or socket.io is not installed; `make bench-peers` does it")
    return Commands([[node, str(HERE / "peers" / "socketio_hub.js"), str(port), "2", str(NODE)]])


def nchan(port: int, directory: Path) -> Commands:
    """nginx with Nchan, two workers."""
    program = find_program("nginx")
    modules = [root / "usr/lib/nginx/modules/ngx_nchan_module.so" for root in (DEBIAN, Path("/"))]
    module = next((path for path in modules if path.exists()), None)
    if module is None:
        raise Missing("nginx has no Nchan module; `make bench-peers` fetches both")
    text = (HERE / "peers" / "nchan.conf.in").read_text()
    for name, value in {
        "@modules@": f"load_module {module};",
        "@workers@": "2",
        "@directory@": str(directory),
        "@port@": str(port),
    }.items():
        text = text.replace(name, value)
    config = directory / "nginx.conf"
    config.write_text(text)
    line = [program, "-e", "stderr", "-p", str(directory), "-c", str(config)]
    return Commands([line if Path("/var/lib/nginx").is_dir() else with_var_lib(line)])


def with_var_lib(line: Sequence[str]) -> list[str]:
    """Debian's nginx insists on ``/var/lib/nginx`` once Nchan is loaded, whatever the configuration says.

    The package was unpacked, not installed, so it gets that directory in a mount namespace of its own.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        raise Missing("nginx was unpacked without /var/lib/nginx and there is no unshare; install nginx")
    script = 'mount -t tmpfs none /var/lib && mkdir /var/lib/nginx && exec "$@"'
    as_root = [] if os.getuid() == 0 else ["--map-root-user"]
    return [unshare, "--mount", *as_root, "sh", "-c", script, "sh", *line]


def limit(mode: str) -> Callable[[int, Path], Commands]:
    """The practical limit in C."""

    def commands(port: int, _directory: Path) -> Commands:
        try:
            return Commands([[str(build("limit")), str(port), mode]])
        except NoCompiler as error:
            raise Missing(str(error)) from error

    return commands


APPS = HERE / "apps"
SERVERS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec("flockwire", "flockwire (1)", flockwire(1), ACKNOWLEDGED, "/readyz", 2),
        Spec(
            "flockwire-2",
            "flockwire (2)",
            flockwire(2),
            ACKNOWLEDGED,
            "/readyz",
            3,
            all_workers_ready,
        ),
        Spec(
            "flockwire-4",
            "flockwire (4)",
            flockwire(4),
            ACKNOWLEDGED,
            "/readyz",
            5,
            all_workers_ready,
        ),
        Spec(
            "connection",
            "our Connection, user's endpoint (1)",
            flockwire(1, "--app", "bench.apps.echo_connection:app"),
            ECHO_ONLY,
            "/readyz",
            2,
        ),
        Spec(
            "connection-receive",
            "the same, receive_json in a loop (1)",
            flockwire(1, "--app", "bench.apps.echo_connection:app"),
            Dialect(hub=(), rooms=(), echo=("--path", "/receive", "--dialect", "raw")),
            "/readyz",
            2,
        ),
        Spec(
            "starlette",
            "Starlette WebSocket under us (1)",
            flockwire(1, "--app", "bench.apps.echo_starlette:app"),
            ECHO_ONLY,
            "/readyz",
            2,
        ),
        Spec("c-each", "C, one send per message (1)", limit("each")),
        Spec("c-joined", "C, joined per turn (1)", limit("joined")),
        Spec("bun", "Bun publish/subscribe (1)", bun),
        Spec("nchan", "Nchan, nginx (2)", nchan, NCHAN, processes=3),
        Spec("picows", "picows, bare loop (1)", peer_module("picows_loop.py", "picows")),
        Spec("socketio", "Socket.IO + cluster adapter (2)", socketio, SOCKETIO, processes=3),
        Spec("uvicorn", "uvicorn + Starlette loop (1)", uvicorn_loop),
        Spec("redis", "uvicorn + Redis (2)", uvicorn_redis, Dialect(echo=None), processes=2),
        Spec(
            "original",
            "original library + Redis (2)",
            original,
            Dialect(echo=None),
            processes=2,
            resident=False,
        ),
    )
}
OURS = ("flockwire", "flockwire-2", "flockwire-4", "connection", "connection-receive", "starlette")


class Fleet:
    """The servers of one run; each is started when first needed. A context manager that stops them all."""

    def __init__(self) -> None:
        self.running: dict[str, Running] = {}
        self.missing: dict[str, str] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_exception: object) -> None:
        for name in list(self.running):
            self.stop(name)

    def get(self, name: str, *, fresh: bool = False) -> Running | None:
        """The server, started now if it was not (or to be fresh); None when it is missing here."""
        if name in self.missing:
            return None
        if fresh:
            self.stop(name)
        if name not in self.running:
            try:
                self.running[name] = Running(SERVERS[name])
            except (Missing, DidNotStart) as error:
                self.missing[name] = str(error)
                return None
        return self.running[name]

    def done_with(self, name: str) -> None:
        """A turn is over: what would disturb the others is stopped."""
        if not SERVERS[name].resident:
            self.stop(name)

    def stop(self, name: str) -> None:
        """Stop one, if it runs."""
        if name in self.running:
            self.running.pop(name).stop()
