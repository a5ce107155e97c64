"""Handing a client's socket to another process of the host, with what was read from it (``unix(7)``, SCM_RIGHTS).

Stands beside the bus: messages go there, connections here. Each process has an end in the runtime directory, to which
others connect when they first hand something over. A socket arrives, or it stays with whoever has it: nothing waits
here but in the kernel's buffers, and when those are full, or nobody is there, :meth:`Passing.hand_over` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from ipc.descriptors import ceiling
from ipc.ends import passing_name
from ipc.link import Key
from ipc.runtime import RuntimeDir

logger = logging.getLogger("ipc")

MAX_BYTES: Final = 16 * 1024
"""Bytes that may go with a socket."""
_WAITING: Final = 128
"""Processes that may connect between two turns of the loop; there are at most 96."""
_A_TURN: Final = 64
"""Sockets taken from one process in a turn of the loop; the descriptor tells again of what is left."""

_INT: Final = struct.Struct("i")
_ONE_DESCRIPTOR: Final = socket.CMSG_LEN(_INT.size)

Adopt = Callable[[socket.socket, bytes], None]


class Passing:
    """A process's end, and its ways to the others'. Open from the constructor on; :meth:`close` it. Of one loop."""

    def __init__(self, runtime: RuntimeDir, slot: int, adopt: Adopt) -> None:
        """``adopt`` gets each socket that comes in, with the bytes; both are its own from then on."""
        self._runtime = runtime
        self._adopt = adopt
        self._name = passing_name(slot, runtime.board.record(slot).epoch)
        self._loop = asyncio.get_running_loop()
        self._ways: dict[Key, socket.socket] = {}
        self._senders: set[socket.socket] = set()
        self._listener: socket.socket | None = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        )
        try:
            # Only of a machine that was killed can there be one: nobody else has our slot and epoch.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=runtime.fd)
            self._listener.bind(f"/proc/self/fd/{runtime.fd}/{self._name}")
            self._listener.listen(_WAITING)
        except BaseException:
            self._listener.close()
            raise
        self._loop.add_reader(self._listener.fileno(), self._on_connect)

    # -- out ---------------------------------------------------------------------------------------------------------

    def hand_over(self, to: Key, descriptor: int, data: bytes) -> bool:
        """Give a socket to peer ``to``; True when it has it: then close yours, and read nothing more from it."""
        if len(data) > MAX_BYTES:
            return False
        way = self._ways.get(to) or self._connect(to)
        if way is None:
            return False
        try:
            socket.send_fds(way, [data], [descriptor])
        except BlockingIOError:
            return False  # it has more to do than it can
        except OSError as error:
            logger.debug("no connection can be handed to peer %d.%d: %s", *to, error)
            self._ways.pop(to).close()
            return False
        return True

    def _connect(self, to: Key) -> socket.socket | None:
        living = self._runtime.board.live_full_slots()
        for gone in [key for key in self._ways if key not in living]:
            self._ways.pop(gone).close()
        way = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            if way.fileno() >= ceiling():
                raise OSError("the last descriptors are kept for ZeroMQ")
            way.connect(f"/proc/self/fd/{self._runtime.fd}/{passing_name(*to)}")
        except OSError as error:
            logger.debug("no way to hand connections to peer %d.%d: %s", *to, error)
            way.close()
            return None
        self._ways[to] = way
        return way

    # -- in ----------------------------------------------------------------------------------------------------------

    def _on_connect(self) -> None:
        while self._listener is not None:
            try:
                sender, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # No descriptors: what cannot be accepted must not wait here. Its sender keeps what it has.
                logger.debug("no connections are taken over from others any more: %s", error)
                self._stop_listening()
                return
            sender.setblocking(False)
            self._senders.add(sender)
            self._loop.add_reader(sender.fileno(), self._on_readable, sender)

    def _on_readable(self, sender: socket.socket) -> None:
        for _ in range(_A_TURN):
            try:
                # Not recv_fds(): in Python 3.11 it forgets its flags, and a child of the application's would inherit.
                data, beside, flags, _ = sender.recvmsg(MAX_BYTES, _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError as error:
                logger.debug("a process that handed connections over: %s", error)
                data, beside, flags = b"", [], 0
            if not data and not beside:
                self._drop(sender)
                return
            for level, kind, content in beside:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(content) >= _INT.size:
                    whole = not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
                    self._take(_INT.unpack_from(content)[0], data, whole)

    def _take(self, descriptor: int, data: bytes, whole: bool) -> None:
        try:
            if not whole:
                raise OSError("more came than fits")
            handed = socket.socket(fileno=descriptor)
        except OSError as error:  # not one of ours has sent it
            logger.debug("what was handed over is no connection: %s", error)
            os.close(descriptor)
            return
        handed.setblocking(False)
        self._adopt(handed, data)

    def _drop(self, sender: socket.socket) -> None:
        self._loop.remove_reader(sender.fileno())
        self._senders.discard(sender)
        sender.close()

    # -- the end -----------------------------------------------------------------------------------------------------

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """Close everything and delete the file. What others have handed over by now is still taken in."""
        try:
            os.unlink(self._name, dir_fd=self._runtime.fd)
        except OSError as error:
            logger.debug("%s: %s", self._name, error)
        self._on_connect()
        self._stop_listening()
        for sender in tuple(self._senders):
            # From here on the other end is told that nothing can be handed over, and keeps it.
            with contextlib.suppress(OSError):
                sender.shutdown(socket.SHUT_RD)
            while sender in self._senders:
                self._on_readable(sender)
        for way in self._ways.values():
            way.close()
        self._ways.clear()
