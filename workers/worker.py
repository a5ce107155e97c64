"""A worker process, from the fork to its exit code: join the bus, serve, drain.

The supervisor calls :func:`run` in a forked child. Commands come over one socket pair; its end of file means that the
supervisor is gone.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

import msgspec
import uvicorn
import uvloop

from ipc.board import SlotState
from ipc.peer import Peer, PeerKind
from ipc.runtime import RuntimeDirError
from workers.context import use_settings
from workers.gauges import Gauges
from workers.http_protocol import HttpProtocol
from workers.hub import create_hub
from workers.logging_setup import configure
from workers.origin import OriginMiddleware
from workers.protocol import WebSocketProtocol
from workers.server import DrainingServer
from workers.settings import Settings

logger = logging.getLogger("workers")

#: Exit codes of a worker: drained; could not start (do not try again at once).
DRAINED: Final = 0
CANNOT_START: Final = 3

#: Close codes of a drain (RFC 6455 section 7.4.1): the hub stops; this worker is replaced.
STOP: Final = 1001
REPLACED: Final = 1012


class CannotStart(Exception):
    """The application or the hub could not start; the text says why."""


def run(
    settings: Settings,
    *,
    listener: socket.socket,
    listener_index: int,
    control: socket.socket,
    runtime_dir: str,
    supervisor_pid: int,
    app: Any = None,
) -> int:
    """Serve until told to drain; returns the exit code.

    Args:
        settings: the hub's.
        listener: the socket to accept from, which stays the supervisor's.
        listener_index: which of the supervisor's sockets that is.
        control: our end of the socket pair. We write ``{"claimed":[slot,epoch]}``, then ``{"ready":true}`` or
            ``{"failed":words}``; we read ``drain stop``, ``drain replaced``, ``quit``.
        runtime_dir: where the bus is.
        supervisor_pid: to see in a TERM whether the supervisor is gone.
        app: the preloaded application; else ``settings.app`` is imported here, or the built-in hub is made.
    """
    configure(
        settings.log_level,
        settings.log_format,
        process=f"worker {listener_index}",
        access_log=settings.access_log,
    )
    faulthandler.enable()
    use_settings(settings)
    worker = _Worker(settings, listener, listener_index, control, runtime_dir, supervisor_pid)
    try:
        application = app if app is not None else load_application(settings.app)
        worker.application = OriginMiddleware(application, settings.allow_origin)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(worker.main())
    except CannotStart as exc:
        worker.tell({"failed": str(exc)})
        return CANNOT_START
    except RuntimeDirError as exc:
        worker.tell({"failed": f"could not join the bus: {exc}"})
        return CANNOT_START


def load_application(path: str | None) -> Any:
    """The application that ``module:attribute`` names; the built-in hub for None.

    Raises:
        CannotStart: it cannot be imported, or is not there.
    """
    if path is None:
        return create_hub()
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as exc:
        logger.exception("the application %r could not be imported", path)
        raise CannotStart(
            f"the application {path!r} could not be imported: {type(exc).__name__}: {exc}"
        ) from exc
    if not callable(found):
        raise CannotStart(f"the application {path!r} is no ASGI application but {type(found).__name__}")
    return found


class _Worker:
    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        listener_index: int,
        control: socket.socket,
        runtime_dir: str,
        supervisor_pid: int,
    ) -> None:
        self.application: Any = None
        self._settings = settings
        self._listener = listener
        self._listener_index = listener_index
        self._control = control
        self._runtime_dir = runtime_dir
        self._supervisor_pid = supervisor_pid
        self._drain: asyncio.Future[int] | None = None
        self._input = b""

    def tell(self, line: dict[str, Any]) -> None:
        """One line for the supervisor; it may be gone."""
        try:
            self._control.sendall(msgspec.json.encode(line) + b"\n")
        except OSError as exc:
            logger.debug("the supervisor did not hear %r: %s", line, exc)

    async def main(self) -> int:
        loop = asyncio.get_running_loop()
        self._drain = loop.create_future()
        self._listen_to_orders(loop)
        peer = await Peer.open(
            self._runtime_dir,
            kind=PeerKind.WORKER,
            listener=self._listener_index,
            rules=self._settings.rules,
            bus_backlog=self._settings.bus_backlog,
        )
        gauges = Gauges(peer)
        try:
            self.tell({"claimed": [peer.slot, peer.epoch]})
            return await self._serve(peer)
        finally:
            gauges.stop()
            await peer.close()

    async def _serve(self, peer: Peer) -> int:
        assert self._drain is not None
        server = DrainingServer(server_config(self._settings, self.application), self._listener)
        try:
            await server.open()
        except SystemExit:
            raise CannotStart(
                "the application failed in its startup; its error is in the log above"
            ) from None
        _settle_memory()
        peer.set_state(SlotState.READY)
        self.tell({"ready": True})
        code = await self._drain
        peer.set_state(SlotState.DRAINING)
        logger.info("draining: clients are closed with %d", code)
        await server.drain(code, self._settings.drain_timeout)
        return DRAINED

    def _listen_to_orders(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        loop.add_signal_handler(signal.SIGTERM, self._on_term)
        self._control.setblocking(False)
        loop.add_reader(self._control.fileno(), self._on_control)
        if os.getppid() != self._supervisor_pid:
            self._order(STOP)

    def _on_term(self) -> None:
        self._order(STOP if os.getppid() != self._supervisor_pid else REPLACED)

    def _on_control(self) -> None:
        try:
            data = self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._order(STOP)
            return
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            self._obey(line.decode(errors="replace").strip())

    def _obey(self, order: str) -> None:
        orders: dict[str, Callable[[], None]] = {
            "drain stop": lambda: self._order(STOP),
            "drain replaced": lambda: self._order(REPLACED),
            "quit": lambda: os._exit(DRAINED),
        }
        action = orders.get(order)
        if action is None:
            logger.error("unknown order from the supervisor: %r", order)
        else:
            action()

    def _order(self, code: int) -> None:
        if self._drain is not None and not self._drain.done():
            self._drain.set_result(code)


def _settle_memory() -> None:
    """What is there now stays: the collector need not walk it again and again as connections come.

    It still runs, less often: connections are freed by reference counts, and ten thousand of them are walked in one go.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def server_config(settings: Settings, application: Any) -> uvicorn.Config:
    """uvicorn's configuration for a worker: our protocols and limits, no signals, no compression."""
    return uvicorn.Config(
        application,
        http=HttpProtocol,
        ws=WebSocketProtocol,
        loop="uvloop",
        lifespan="auto",
        log_config=None,
        access_log=settings.access_log,
        ws_max_size=settings.max_message_size,
        ws_per_message_deflate=False,
        ws_ping_interval=settings.ping_interval or None,
        ws_ping_timeout=settings.ping_timeout or None,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        server_header=False,
        proxy_headers=False,
        backlog=2048,
        timeout_keep_alive=15,
    )


if sys.platform != "linux":  # pragma: no cover
    raise ImportError("flockwire runs on Linux only")
