"""Handing a client's socket to another process of the host, with what was read from it (``unix(7)``, SCM_RIGHTS).

Stands beside the bus: messages go there, connections here. Each process has an end in the runtime directory, to which
others connect when they first offer something. What is offered is answered: taken, or not. Until then whoever offers it
keeps it and leaves it alone; when the other end refuses or dies, it goes on as if nothing had been. So a socket has
one owner at any time, whatever happens to either process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from ipc.descriptors import ceiling
from ipc.ends import passing_name
from ipc.link import Key
from ipc.runtime import RuntimeDir

logger = logging.getLogger("ipc")

MAX_BYTES: Final = 16 * 1024
"""Bytes that may go with a socket."""
UNANSWERED: Final = 64
"""Sockets that one process may have offered another and not have been answered for."""
_WAITING: Final = 128
"""Processes that may connect between two turns of the loop; there are at most 96."""
_RETRY: Final = 1.0
"""Seconds until it is tried again to accept processes, after there was no descriptor for one."""
_TAKEN: Final = b"\x01"
_REFUSED: Final = b"\x00"
_INT: Final = struct.Struct("i")
_ONE_DESCRIPTOR: Final = socket.CMSG_LEN(_INT.size)

Wants = Callable[[bytes], bool]
Adopt = Callable[[socket.socket, bytes], None]
Answer = Callable[[bool], None]


class _Way:
    """The way to one other process."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.offered: deque[Answer] = deque()
        """Who waits for an answer, in the order of the offers."""


class Passing:
    """A process's end, and its ways to the others'. Open from the constructor on; :meth:`close` it. Of one loop."""

    def __init__(self, runtime: RuntimeDir, slot: int, wants: Wants, adopt: Adopt) -> None:
        """``wants`` is asked with the bytes that come with a socket; if it does, ``adopt`` gets both for its own."""
        self._runtime = runtime
        self._wants = wants
        self._adopt = adopt
        self._name = passing_name(slot, runtime.board.record(slot).epoch)
        self._loop = asyncio.get_running_loop()
        self._ways: dict[Key, _Way] = {}
        self._senders: set[socket.socket] = set()
        self._retry: asyncio.TimerHandle | None = None
        # Only of a machine that was killed can there be a file: nobody else has our slot and epoch.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=runtime.fd)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(f"/proc/self/fd/{runtime.fd}/{self._name}")
            self._listener.listen(_WAITING)
        except BaseException:
            self._listener.close()
            raise
        self._listen()

    # -- out ---------------------------------------------------------------------------------------------------------

    def offer(self, to: Key, descriptor: int, data: bytes, answer: Answer) -> bool:
        """Offer a socket to peer ``to``. False: it cannot be offered now, and stays with you.

        True: neither read from it nor write to it until ``answer`` is called, once, on the loop. ``answer(True)`` says
        that it was taken: close yours. ``answer(False)`` says that it is your own again.
        """
        if len(data) > MAX_BYTES:
            return False
        way = self._ways.get(to) or self._connect(to)
        if way is None or len(way.offered) >= UNANSWERED:
            return False
        try:
            socket.send_fds(way.socket, [data], [descriptor])
        except BlockingIOError:
            return False
        except OSError as error:
            logger.debug("no connection can be offered to peer %d.%d: %s", *to, error)
            return False  # its end closes, which we are told, too
        way.offered.append(answer)
        return True

    def unanswered(self, to: Key | None = None) -> int:
        """So many were offered, to one peer or to all, and have not been answered for."""
        ways = self._ways.values() if to is None else filter(None, [self._ways.get(to)])
        return sum(len(way.offered) for way in ways)

    def _connect(self, to: Key) -> _Way | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            if sock.fileno() >= ceiling():
                raise OSError("the last descriptors are kept for ZeroMQ")
            sock.connect(f"/proc/self/fd/{self._runtime.fd}/{passing_name(*to)}")
        except OSError as error:
            logger.debug("no way to offer connections to peer %d.%d: %s", *to, error)
            sock.close()
            return None
        way = self._ways[to] = _Way(sock)
        self._loop.add_reader(sock.fileno(), self._on_answer, to, way)
        return way

    def _on_answer(self, to: Key, way: _Way) -> None:
        try:
            said = way.socket.recv(len(_TAKEN))
        except BlockingIOError:
            return
        except OSError as error:
            logger.debug("the end of peer %d.%d: %s", *to, error)
            said = b""
        if said in (_TAKEN, _REFUSED) and way.offered:
            way.offered.popleft()(said == _TAKEN)
        else:  # it has closed, or it is none of ours
            self._forget(to, way)

    def _forget(self, to: Key, way: _Way) -> None:
        """What was not answered for was not taken: nobody takes without being able to say so."""
        del self._ways[to]
        self._loop.remove_reader(way.socket.fileno())
        way.socket.close()
        while way.offered:
            way.offered.popleft()(False)

    # -- in ----------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listener.fileno(), self._on_connect)

    def _on_connect(self) -> None:
        try:
            sender, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            logger.debug("a process that wants to offer connections has to wait: %s", error)
            self._loop.remove_reader(self._listener.fileno())
            self._retry = self._loop.call_later(_RETRY, self._listen)
            return
        if sender.fileno() >= ceiling():
            sender.close()
            return
        sender.setblocking(False)
        self._senders.add(sender)
        self._loop.add_reader(sender.fileno(), self._on_offer, sender)

    def _on_offer(self, sender: socket.socket) -> None:
        try:
            # Not recv_fds(): in Python 3.11 it forgets its flags, and a child of the application's would inherit.
            data, beside, flags, _ = sender.recvmsg(MAX_BYTES, _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError as error:
            logger.debug("a process that offered connections: %s", error)
            data, beside, flags = b"", [], 0
        if not data and not beside:
            self._drop(sender)
            return
        offered = _socket_in(beside, whole=not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))
        if offered is not None and not self._wants(data):
            offered.close()
            offered = None
        try:
            sender.send(_REFUSED if offered is None else _TAKEN)
        except OSError as error:
            # Whoever cannot be told that we take it keeps it.
            logger.debug("a process that offered a connection has gone: %s", error)
            if offered is not None:
                offered.close()
            self._drop(sender)
            return
        if offered is not None:
            self._adopt(offered, data)

    def _drop(self, sender: socket.socket) -> None:
        self._loop.remove_reader(sender.fileno())
        self._senders.discard(sender)
        sender.close()

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close everything and delete the file; who waits for an answer gets it. A second call does nothing."""
        if self._listener.fileno() < 0:
            return
        if self._retry is not None:
            self._retry.cancel()
        try:
            os.unlink(self._name, dir_fd=self._runtime.fd)
        except OSError as error:
            logger.debug("%s: %s", self._name, error)
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for sender in tuple(self._senders):
            self._drop(sender)
        for to, way in tuple(self._ways.items()):
            # From here on the other end cannot answer, so what it has answered by now is all that it takes.
            with contextlib.suppress(OSError):
                way.socket.shutdown(socket.SHUT_RD)
            for _ in range(UNANSWERED):
                if to in self._ways:
                    self._on_answer(to, way)
            if to in self._ways:
                self._forget(to, way)


def _socket_in(beside: list[tuple[int, int, bytes]], whole: bool) -> socket.socket | None:
    """The socket that came with a message; None if there is none, or it cannot be kept."""
    for level, kind, content in beside:
        if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS) or len(content) < _INT.size:
            continue
        descriptor = _INT.unpack_from(content)[0]
        try:
            if not whole or descriptor >= ceiling():
                raise OSError("it was cut off, or it is one of the last descriptors")
            found = socket.socket(fileno=descriptor)
        except OSError as error:
            logger.debug("what was offered is not taken: %s", error)
            os.close(descriptor)
            return None
        found.setblocking(False)
        return found
    return None
