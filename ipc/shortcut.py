"""The short way between two processes of a host: a datagram from socket to socket, without ZeroMQ's threads.

Stands beside the mesh, between ``outbound.py`` and ``inbound.py``. A batch that goes through ZeroMQ wakes a thread of
the sender, which wakes a thread of the receiver, which wakes its event loop; on an idle machine these are two thirds
of the time that it takes. The same frame as a datagram (``unix(7)``, SOCK_DGRAM) wakes the event loop at once.

A datagram arrives, in order, or ``send`` says that there is no room: the kernel keeps few of them for a receiver
(``net.unix.max_dgram_qlen``, often 10). So this is for the usual, small batches; large ones and bursts go through the
mesh. To keep the order a sender takes the short way only when all that went through the mesh has been processed, and a
receiver looks here before it believes that something is missing in the mesh.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket

from ipc.descriptors import ceiling
from ipc.runtime import RuntimeDir, shortcut_name

logger = logging.getLogger("ipc")

MAX_BYTES = 64 * 1024
"""A frame that is larger goes through the mesh."""


class ShortcutEnd:
    """Where the datagrams for this process come in."""

    def __init__(self, runtime: RuntimeDir, slot: int, epoch: int) -> None:
        name = shortcut_name(slot, epoch)
        # Only of a machine that was killed can there be one: nobody else has our slot and epoch.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=runtime.fd)
        self._runtime = runtime
        self._name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.bind(f"/proc/self/fd/{runtime.fd}/{name}")
        except BaseException:
            self._socket.close()
            raise
        self.fd = self._socket.fileno()
        """Readable while there is something; level-triggered."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        self._poll = poller.poll
        self.most = _queue_length()
        """So many frames at most wait here at a time."""

    def receive(self) -> bytes | None:
        """The next frame; None when there is none. What is longer than a frame may be arrives cut off."""
        # To be told so by an exception costs seven times as much as to ask.
        return self._socket.recv(MAX_BYTES) if self._poll(0) else None

    def close(self) -> None:
        """Close the socket and delete its file."""
        self._socket.close()
        try:
            os.unlink(self._name, dir_fd=self._runtime.fd)
        except OSError as error:
            logger.debug("%s: %s", self._name, error)


def _queue_length() -> int:
    try:
        with open("/proc/sys/net/unix/max_dgram_qlen", encoding="ascii") as file:
            return int(file.read()) + 1
    except (OSError, ValueError):
        return 4096


class Shortcut:
    """The short way to one peer. Made by :meth:`open`."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._send = connected.send

    @classmethod
    def open(cls, runtime: RuntimeDir, slot: int, epoch: int) -> Shortcut | None:
        """None where there is none: then everything goes through the mesh."""
        connected: socket.socket | None = None
        try:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            if connected.fileno() >= ceiling():
                raise OSError(errno.EMFILE, "the last descriptors are kept for ZeroMQ")
            connected.setblocking(False)
            connected.connect(f"/proc/self/fd/{runtime.fd}/{shortcut_name(slot, epoch)}")
        except OSError as error:
            logger.debug("no short way to peer %d.%d: %s", slot, epoch, error)
            if connected is not None:
                connected.close()
            return None
        return cls(connected)

    def send(self, frame: bytes) -> bool:
        """Send a frame if there is room for it now; False when it must go another way."""
        if len(frame) > MAX_BYTES:
            return False
        try:
            self._send(frame)
        except OSError:
            return False  # no room, or nobody there any more: the mesh finds out which
        return True

    def close(self) -> None:
        """Close the socket; what was sent arrives."""
        self._socket.close()
