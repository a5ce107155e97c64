"""``--reload``: a process that watches the source files and tells the supervisor when they change.

A process of its own because watching takes threads, and the supervisor must have none when it forks. No message
passes here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket

from supervisor.child import fork
from workers import logging_setup
from workers.settings import Settings

logger = logging.getLogger("supervisor")

LOOK_FOR_END = 500
"""Milliseconds between two looks whether the supervisor has hung up."""


class SourceWatcher:
    """The watching process, seen from the supervisor."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel

    def changed(self) -> bool | None:
        """Whether files have changed since the last call; None when the watcher is gone."""
        found = False
        try:
            while data := self.channel.recv(4096):
                found = bool(data)
        except BlockingIOError:
            return found
        except OSError:
            return None
        return None

    def close(self) -> None:
        """Hang up; the watcher ends."""
        self.channel.close()


def start(settings: Settings, directory: str) -> SourceWatcher:
    """Fork the watcher of a directory. To be called before anything else is open.

    Raises:
        OSError: there is no process left.
    """
    ours, theirs = socket.socketpair()
    try:
        pid = fork(lambda: _watch(settings, directory, theirs), keep=(theirs.fileno(),))
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    return SourceWatcher(pid, ours)


def _watch(settings: Settings, directory: str, channel: socket.socket) -> int:
    """The watcher's life: one byte per burst of changes, until the supervisor hangs up."""
    import watchfiles

    logging_setup.configure(settings.log_level, settings.log_format, "watcher")
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    channel.setblocking(False)
    changes = watchfiles.watch(
        directory,
        watch_filter=watchfiles.PythonFilter(),
        rust_timeout=LOOK_FOR_END,
        yield_on_timeout=True,
        raise_interrupt=False,
    )
    for burst in changes:
        if _hung_up(channel):
            return 0
        if burst:
            names = sorted(os.path.relpath(path, directory) for _, path in burst)
            logger.info("changed: %s%s", ", ".join(names[:5]), " ..." if len(names) > 5 else "")
            channel.send(b"c")
    return 0


def _hung_up(channel: socket.socket) -> bool:
    try:
        return channel.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
