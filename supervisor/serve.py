"""Puts a hub together, in the order in which it can fail, and takes it apart again. No message passes here."""

from __future__ import annotations

import fcntl
import gc
import importlib
import importlib.util
import logging
import os
import selectors
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from ipc.board import PeerKind
from ipc.runtime import PID_NAME, DirectoryInUse, RuntimeDir, RuntimeDirError, default_runtime_dir
from supervisor import banner, reloader
from supervisor.arbiter import Arbiter
from supervisor.child import open_standard_streams, thread_names
from supervisor.control import ControlServer
from supervisor.flock import DRAIN_GRACE, Flock, WorkerMain
from supervisor.listeners import AddressError, AddressInUse, ListenerGroup
from supervisor.restart import EXIT_CANNOT_START, EXIT_FAILURE, EXIT_IN_USE
from supervisor.signals import SignalQueue
from workers import logging_setup
from workers.settings import Settings

if TYPE_CHECKING:
    from supervisor.bridge import BridgeKeeper

logger = logging.getLogger("supervisor")

T = TypeVar("T")

RETRY = 0.05
"""Seconds between two looks at what a hub that just ended still holds."""
RETRY_FOR = 1.0
"""Seconds after which what is still held is in use: killed processes take a moment to be gone."""


class StartError(Exception):
    """The hub can not start; the text says why."""


def serve(settings: Settings, *, worker_main: WorkerMain | None = None) -> int:
    """Run a hub until it ends.

    Args:
        settings: all of them.
        worker_main: what a forked worker runs instead of :func:`workers.worker.run`, for tests.

    Returns:
        The exit code of the process, see docs/configuration.md.
    """
    logging_setup.configure(
        settings.log_level, settings.log_format, "supervisor", access_log=settings.access_log
    )
    open_standard_streams()
    try:
        with ExitStack() as stack:
            arbiter = _assemble(settings, worker_main, stack)
            exit_code = _run(arbiter)
    except (AddressInUse, DirectoryInUse) as error:
        logger.critical("%s", error)
        return EXIT_IN_USE
    except (AddressError, RuntimeDirError, StartError, OSError) as error:
        logger.critical("the hub can not start: %s", error)
        return EXIT_CANNOT_START
    if arbiter.failure:
        logger.critical("the hub can not start: %s", arbiter.failure)
    return exit_code


def _run(arbiter: Arbiter) -> int:
    """The main loop; whatever goes wrong in it, no worker outlives it."""
    try:
        return arbiter.run()
    except Exception:
        logger.critical("the supervisor has failed; all workers end", exc_info=True)
        arbiter.halt(EXIT_FAILURE)
        return EXIT_FAILURE


def _assemble(settings: Settings, worker_main: WorkerMain | None, stack: ExitStack) -> Arbiter:
    """Take the address and the runtime directory, load what is to be shared, and be ready to fork."""
    watcher = None
    if settings.reload:
        watcher = reloader.start(settings, os.getcwd())
        stack.callback(watcher.close)
    group = _patiently(lambda: ListenerGroup(settings.host, settings.port), AddressInUse, lambda: RETRY_FOR)
    stack.callback(group.close)
    # Closed after the runtime directory is gone: who waits for the end of the hub sees it by the hang-up.
    selector = stack.enter_context(selectors.PollSelector())  # epoll would be shared with the forked workers
    last = stack.enter_context(ExitStack())
    _hold_data_dir(settings, stack)
    listeners = [group.add(index) for index in range(settings.workers)]
    runtime = _take_directory(settings, settings.runtime_dir or default_runtime_dir(group.port))
    stack.callback(_leave, runtime)
    _write_pid_file(runtime)
    app = _preload(settings) if settings.preload else None
    _check_threads()
    signals = SignalQueue()
    signals.install()
    flock = Flock(settings, group, runtime, selector, worker_main=worker_main, app=app)
    for listener in listeners:
        flock.add_seat(listener)
    arbiter = Arbiter(
        flock,
        selector,
        signals,
        address=banner.base_url(settings, group.port),
        watcher=watcher,
        bridge=_bridge(flock),
    )
    arbiter.control = ControlServer(runtime.fd, selector, arbiter.handle_request)
    last.callback(arbiter.control.close)
    banner.announce(settings, group.port, runtime.path)
    return arbiter


def _hold_data_dir(settings: Settings, stack: ExitStack) -> None:
    """Keep other hubs out of ``--data-dir``: two logs in one would be delivered by neither.

    Raises:
        DirectoryInUse: another hub has it.
        StartError: it can not be made or opened.
    """
    path = settings.rules.data_dir
    if not path or not settings.rules.any_history:
        return
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(os.path.join(path, "hub.lock"), flags, 0o600)
    except OSError as error:
        raise StartError(f"--data-dir = {path!r} can not be used: {error.strerror}") from error
    stack.callback(os.close, fd)

    def lock() -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUse(f"--data-dir = {path!r} is in use by another hub; name another") from None

    _patiently(lock, DirectoryInUse, lambda: RETRY_FOR)


def _bridge(flock: Flock) -> BridgeKeeper | None:
    """Who keeps the bridge, if there is to be one.

    Raises:
        StartError: what it needs is not installed.
    """
    if flock.settings.redis_url is None:
        return None
    if importlib.util.find_spec("redis") is None:
        raise StartError("--redis-url needs the package redis: pip install 'redis[hiredis]>=5.1'")
    from supervisor.bridge import BridgeKeeper

    return BridgeKeeper(flock)


def _take_directory(settings: Settings, path: str) -> RuntimeDir:
    """The runtime directory, once the workers of a supervisor that was killed have drained."""

    def patience() -> float:
        if not _orphans(path):
            return RETRY_FOR
        logger.warning(
            "%s is in use by workers of a hub that was killed: waiting until they have drained", path
        )
        return settings.drain_timeout + DRAIN_GRACE

    return _patiently(lambda: RuntimeDir.supervise(path), DirectoryInUse, patience)


def _orphans(path: str) -> bool:
    """Whether workers live in a runtime directory that has no supervisor any more."""
    try:
        with RuntimeDir.open(path, create=False) as runtime:
            board = runtime.open_board()
            kinds = {board.record(slot).kind for slot in runtime.living()}
            return PeerKind.WORKER in kinds and not runtime.supervisor_lives()
    except (RuntimeDirError, FileNotFoundError):
        return False


def _patiently(attempt: Callable[[], T], in_use: type[Exception], patience: Callable[[], float]) -> T:
    """Try until it works, or what it needs has been in use for too long."""
    started = time.monotonic()
    limit: float | None = None
    while True:
        try:
            return attempt()
        except in_use:
            limit = patience() if limit is None else limit
            if time.monotonic() - started > limit:
                raise
        time.sleep(RETRY)


def _leave(runtime: RuntimeDir) -> None:
    """The end of an ordered stop: the directory goes."""
    try:
        runtime.remove()
    except RuntimeDirError as error:
        logger.warning("%s", error)
    runtime.close()


def _write_pid_file(runtime: RuntimeDir) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(PID_NAME, flags, 0o600, dir_fd=runtime.fd), "w", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")


def _preload(settings: Settings) -> Any:
    """Import the application here, so that all workers share its memory; None for the built-in hub.

    Raises:
        StartError: it can not be imported.
    """
    try:
        importlib.import_module("workers.worker")
        app = None if settings.app is None else load_application(settings.app)
    except Exception as error:
        logger.debug("preload", exc_info=True)
        raise StartError(f"--preload: {settings.app}: {type(error).__name__}: {error}") from error
    gc.collect()
    gc.freeze()  # the collector of a worker does not touch, and so does not copy, what is shared
    return app


def load_application(name: str) -> Any:
    """Import ``module:attribute``.

    Raises:
        Exception: whatever importing it raises.
    """
    module, _, attributes = name.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def _check_threads() -> None:
    """A fork copies one thread; the locks of the others would stay locked in the workers for ever.

    Raises:
        StartError: there is more than one; names them.
    """
    names = thread_names()
    if len(names) > 1:
        others = ", ".join(names[1:])
        raise StartError(
            f"{len(names) - 1} more threads than one run before the workers are forked: {others}"
        )
