"""The listening sockets, one SO_REUSEPORT socket per listener index, and which of them get new connections.

First station of every connection: the kernel puts it into the queue of one of these sockets. The supervisor
holds them for as long as their index exists, so what waits in a dead worker's queue waits for its successor.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import socket
import struct
from collections.abc import Iterable, Sequence

logger = logging.getLogger("supervisor")

BACKLOG = 2048
"""Connections that may wait in the queue of one socket (the kernel caps it at net.core.somaxconn)."""

SO_ATTACH_REUSEPORT_CBPF = 51
"""asm-generic/socket.h; Python's socket module does not name it."""

TCP_INFO_QUEUE = struct.Struct("24xI")
"""Of a listening socket's TCP_INFO: tcpi_unacked, which holds the length of the accept queue."""

# Classic BPF (linux/filter.h): load a word from an offset, modulo, jump if equal, return.
BPF_LD_W_ABS = 0x20
BPF_ALU_MOD_K = 0x94
BPF_JMP_JEQ_K = 0x15
BPF_RET_K = 0x06
SKF_AD_RANDOM = 0xFFFFF000 + 56
"""The offset at which a load gives a random number instead of a word of the packet."""

Instruction = tuple[int, int, int, int]


class AddressError(Exception):
    """The address can not be bound; the text says which one and why."""


class AddressInUse(AddressError):
    """Somebody else listens there."""


class Listener:
    """One listener index and its socket, which the supervisor holds and workers inherit."""

    def __init__(self, index: int, sock: socket.socket) -> None:
        self.index = index
        self.socket = sock

    def waiting(self) -> int:
        """How many connections are in its queue and not yet accepted."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_QUEUE.size)
        queued: int = TCP_INFO_QUEUE.unpack(info)[0]
        return queued


class ListenerGroup:
    """All listeners of one address, in the order in which the kernel numbers them.

    The kernel appends a socket that starts to listen, and puts the last one into the place of one that is
    closed. ``_order`` follows that, because a steering program speaks of places, not of sockets.
    """

    def __init__(self, host: str, port: int) -> None:
        """Resolve ``host`` and make sure that nobody listens there.

        Raises:
            AddressInUse: somebody does.
            AddressError: the host is unknown, not of this machine, or the port is not ours to bind.
        """
        self.host = host
        self._family, self._address = resolve(host, port)
        self._order: list[Listener] = []
        self._live: frozenset[int] = frozenset()
        self._steering = True
        if port:
            self._probe()

    @property
    def port(self) -> int:
        """The port, the one that the kernel chose if 0 was asked for."""
        port: int = self._address[1]
        return port

    def add(self, index: int) -> Listener:
        """Open the socket of one more listener index; it joins the end of the kernel's list.

        Raises:
            AddressError: it can not be bound.
        """
        sock = self._bind(reuse_port=True)
        try:
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise self._explain(error) from error
        sock.setblocking(False)
        self._address = sock.getsockname()
        listener = Listener(index, sock)
        self._order.append(listener)
        self._attach()
        return listener

    def remove(self, index: int) -> None:
        """Close one listener. No other process may hold its socket any more.

        The socket that moves into its place gets nothing until the program knows its new place.
        """
        place = self._place(index)
        last = len(self._order) - 1
        self._install([p for p in self._live_places() if p not in (place, last)])
        self._order[place].socket.close()
        self._order[place] = self._order[last]
        self._order.pop()
        self._live -= {index}
        self._attach()

    def steer(self, live: Iterable[int]) -> None:
        """From now on give new connections to these indexes only, at random; if there are none, to all."""
        wanted = frozenset(live) & {listener.index for listener in self._order}
        if wanted != self._live:
            self._live = wanted
            self._attach()

    @property
    def steered(self) -> frozenset[int]:
        """The indexes that get new connections; empty when the kernel chooses among all."""
        return self._live

    def close(self) -> None:
        """Close the supervisor's hold on all of them."""
        for listener in self._order:
            listener.socket.close()
        self._order.clear()

    def _probe(self) -> None:
        """Bind once without SO_REUSEPORT, which would let two hubs of one user share a port in silence."""
        self._bind(reuse_port=False).close()

    def _bind(self, *, reuse_port: bool) -> socket.socket:
        sock = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(self._address)
        except OSError as error:
            sock.close()
            raise self._explain(error) from error
        return sock

    def _explain(self, error: OSError) -> AddressError:
        address = format_address(self.host, self.port)
        if error.errno == errno.EADDRINUSE:
            return AddressInUse(f"address in use: somebody else listens on {address}")
        return AddressError(f"can not listen on {address}: {error.strerror}")

    def _place(self, index: int) -> int:
        return next(place for place, listener in enumerate(self._order) if listener.index == index)

    def _live_places(self) -> list[int]:
        return [place for place, listener in enumerate(self._order) if listener.index in self._live]

    def _attach(self) -> None:
        self._install(self._live_places() or list(range(len(self._order))))

    def _install(self, places: Sequence[int]) -> None:
        """Replace the group's program; without a place to name, leave the present one."""
        if not places or not self._steering:
            return
        try:
            attach_program(self._order[0].socket, steering_program(places))
        except OSError as error:
            self._steering = False
            logger.warning("can not steer connections (%s): the kernel spreads them over all workers", error)


def steering_program(places: Sequence[int]) -> list[Instruction]:
    """Classic BPF that returns one of ``places`` at random: (code, jump if true, jump if false, constant)."""
    program: list[Instruction] = [(BPF_LD_W_ABS, 0, 0, SKF_AD_RANDOM), (BPF_ALU_MOD_K, 0, 0, len(places))]
    for turn, place in enumerate(places[:-1]):
        program += [(BPF_JMP_JEQ_K, 0, 1, turn), (BPF_RET_K, 0, 0, place)]
    return [*program, (BPF_RET_K, 0, 0, places[-1])]


def attach_program(sock: socket.socket, program: Sequence[Instruction]) -> None:
    """Make ``program`` choose the socket for each new connection to the group that ``sock`` is in."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = struct.pack("HP", len(program), ctypes.addressof(code))  # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, header)


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    """The address to bind for ``host``; IPv4 where a name has both.

    Raises:
        AddressError: the name is unknown.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise AddressError(f"can not listen on host {host!r}: {error}") from error
    found.sort(key=lambda item: item[0] != socket.AF_INET)
    family, _, _, _, address = found[0]
    return family, address  # type: ignore[return-value]


def format_address(host: str, port: int) -> str:
    """``host:port`` as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
