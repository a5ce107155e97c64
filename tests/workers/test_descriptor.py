"""Who writes to a descriptor past its transport relies on it: the transport closes it after ``connection_lost``.

Were it closed before, a new client's socket could have the same number by then and get another client's messages.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable

import pytest
import uvloop

from tests.support import until_async
from tests.workers.server_fixture import Live, serving, uvrun
from workers.sinks import SocketSink

RESET = struct.pack("ii", 1, 0)


class Watching(asyncio.Protocol):
    """Notes whether its descriptor is still the same socket when it is told that the connection is lost."""

    def __init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.fd = transport.get_extra_info("socket").fileno()
        self.inode = os.fstat(self.fd).st_ino

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(os.fstat(self.fd).st_ino == self.inode)


def _reset(peer: socket.socket, transport: asyncio.Transport) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()


def _leave(peer: socket.socket, transport: asyncio.Transport) -> None:
    peer.close()


def _write_into_nothing(peer: socket.socket, transport: asyncio.Transport) -> None:
    transport.pause_reading()
    _reset(peer, transport)
    transport.write(b"x" * 1_000_000)
    transport.write(b"x")


def _abort(peer: socket.socket, transport: asyncio.Transport) -> None:
    transport.abort()


def _close(peer: socket.socket, transport: asyncio.Transport) -> None:
    transport.close()


@pytest.mark.parametrize(
    "new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"]
)
@pytest.mark.parametrize("end", [_reset, _leave, _write_into_nothing, _abort, _close])
def test_the_descriptor_is_ours_until_connection_lost(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    end: Callable[[socket.socket, asyncio.Transport], None],
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as server:
            peer = socket.create_connection(server.getsockname())
            accepted, _ = server.accept()
        accepted.setblocking(False)
        transport, protocol = await loop.connect_accepted_socket(Watching, accepted)
        end(peer, transport)
        async with asyncio.timeout(10):
            assert await protocol.lost
        peer.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


async def _lose_one_client(live: Live) -> list[int]:
    """The descriptor that the fan-out sees, before and when the protocol knows of the end."""
    client = await live.raw("/ws/gone?topic=t")
    (connection,) = live.manager
    sink = connection.target[0]
    assert isinstance(sink, SocketSink)
    protocol = live.protocols[0]
    seen = [sink.fd]
    ended = protocol.connection_lost

    def noted(exc: Exception | None) -> None:
        ended(exc)
        seen.append(sink.fd)

    protocol.connection_lost = noted  # type: ignore[method-assign]
    client.writer.transport.abort()
    await until_async(lambda: len(seen) == 2, 10.0, "the end of the connection")
    del protocol.connection_lost
    return seen


def test_a_sink_has_no_descriptor_once_its_client_is_gone() -> None:
    async def main() -> None:
        async with serving() as live:
            before, after = await _lose_one_client(live)
            assert before >= 0
            assert after == -1

    uvrun(main())
