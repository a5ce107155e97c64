"""Handing sockets over: what arrives, what stays with whoever has it, and what does no harm."""

from __future__ import annotations

import array
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ipc import passing as module
from ipc.ends import passing_name
from ipc.passing import MAX_BYTES, Passing
from ipc.peer import Peer
from tests.ipc.actors import peers
from tests.support import run, until_async


class Taken:
    """What one end has got."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.data: list[bytes] = []

    def __call__(self, sock: socket.socket, data: bytes) -> None:
        self.sockets.append(sock)
        self.data.append(data)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


@asynccontextmanager
async def ends(path: Path) -> AsyncIterator[tuple[Passing, Passing, Taken, Peer]]:
    """Two peers' ends; what the second has got, and the second peer."""
    taken = Taken()
    before = descriptors()
    async with peers(path / "hub", 2) as (a, b):
        first, second = Passing(a.runtime, a.slot, taken), Passing(b.runtime, b.slot, taken)
        try:
            yield first, second, taken, b
        finally:
            first.close()
            second.close()
            taken.close()
    await until_async(lambda: descriptors() <= before, what="every descriptor closed")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def connection() -> tuple[socket.socket, socket.socket]:
    """Both ends of a real TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    client.settimeout(5)
    return client, accepted


def key(peer: Peer) -> tuple[int, int]:
    return peer.slot, peer.epoch


def test_a_socket_arrives_with_what_was_read_from_it_and_goes_on_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (first, _, taken, b):
            clients = []
            for number in range(40):
                client, accepted = connection()
                clients.append(client)
                assert first.hand_over(key(b), accepted.fileno(), b"read %d" % number)
                accepted.close()
            await until_async(lambda: len(taken.data) == 40)
            assert taken.data == [b"read %d" % number for number in range(40)]
            for number, (client, sock) in enumerate(zip(clients, taken.sockets, strict=True)):
                assert not sock.getblocking() and not sock.get_inheritable()
                client.sendall(b"?")
                sock.setblocking(True)
                assert sock.recv(9) == b"?"
                sock.sendall(b"answer %d" % number)
                assert client.recv(99) == b"answer %d" % number
                client.close()

    run(main())


def test_what_cannot_be_handed_over_stays_usable_where_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (first, second, taken, b):
            client, accepted = connection()
            assert not first.hand_over(key(b), accepted.fileno(), bytes(MAX_BYTES + 1)), "too much"
            assert not first.hand_over((b.slot, b.epoch + 1), accepted.fileno(), b"x"), "nobody is there"
            assert first.hand_over(key(b), accepted.fileno(), bytes(MAX_BYTES))
            await until_async(lambda: taken.data == [bytes(MAX_BYTES)])
            second.close()
            assert not first.hand_over(key(b), accepted.fileno(), b"x"), "it has closed"
            assert not first.hand_over(key(b), accepted.fileno(), b"x"), "and is not there any more"
            assert not Path(b.runtime.path, passing_name(*key(b))).exists()
            accepted.sendall(b"still here")
            assert client.recv(99) == b"still here"
            client.close()
            accepted.close()

    run(main())


def test_a_receiver_that_does_not_come_round_gets_a_bounded_number_and_all_of_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (first, _, taken, b):
            client, accepted = connection()
            given = 0
            while first.hand_over(key(b), accepted.fileno(), bytes(500)):
                given += 1
            assert 10 < given < 1000
            assert not taken.data
            await until_async(lambda: len(taken.data) == given)
            assert first.hand_over(key(b), accepted.fileno(), b"again")
            await until_async(lambda: len(taken.data) == given + 1)
            client.close()
            accepted.close()

    run(main())


def test_closing_takes_in_what_was_handed_over_before(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (first, second, taken, b):
            client, accepted = connection()
            for number in range(5):
                assert first.hand_over(key(b), accepted.fileno(), b"%d" % number)
            second.close()
            assert taken.data == [b"%d" % number for number in range(5)]
            client.close()
            accepted.close()

    run(main())


def nothing_with_it(way: socket.socket) -> None:
    way.send(b"no descriptor")


def no_socket(way: socket.socket) -> None:
    with tempfile.TemporaryFile() as file:
        socket.send_fds(way, [b"a file"], [file.fileno()])


def too_long(way: socket.socket) -> None:
    with socket.socket() as sock:
        socket.send_fds(way, [bytes(MAX_BYTES + 1)], [sock.fileno()])


def too_many(way: socket.socket) -> None:
    with socket.socket() as sock:
        several = array.array("i", [sock.fileno()] * 5)
        way.sendmsg([b"five"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, several)])


def an_end(way: socket.socket) -> None:
    way.close()


@pytest.mark.parametrize("foreign", [nothing_with_it, no_socket, too_long, too_many, an_end])
def test_what_is_not_ours_is_dropped_and_the_next_is_taken(
    tmp_path: Path, foreign: Callable[[socket.socket], None]
) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (first, _, taken, b):
            client, accepted = connection()
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as way:
                way.connect(f"{b.runtime.path}/{passing_name(*key(b))}")
                foreign(way)
                if way.fileno() >= 0:
                    socket.send_fds(way, [b"ours"], [accepted.fileno()])
                    await until_async(lambda: b"ours" in taken.data)
            assert first.hand_over(key(b), accepted.fileno(), b"last")
            await until_async(lambda: b"last" in taken.data)
            assert set(taken.data) <= {b"ours", b"last"}
            client.close()
            accepted.close()

    run(main())


def test_the_last_descriptors_are_not_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (first, _, taken, b):
            client, accepted = connection()
            monkeypatch.setattr(module, "ceiling", lambda: 3)
            assert not first.hand_over(key(b), accepted.fileno(), b"x")
            monkeypatch.undo()
            assert first.hand_over(key(b), accepted.fileno(), b"x")
            await until_async(lambda: taken.data == [b"x"])
            client.close()
            accepted.close()

    run(main())


def test_ways_to_those_who_have_gone_are_closed(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as (first, _, _, b), peers(tmp_path / "hub", 1) as (c,):
            client, accepted = connection()
            third = Passing(c.runtime, c.slot, lambda sock, _: sock.close())
            assert first.hand_over(key(c), accepted.fileno(), b"x")
            third.close()
            await c.close()
            assert first.hand_over(key(b), accepted.fileno(), b"x")
            assert set(first._ways) == {key(b)}
            client.close()
            accepted.close()

    run(main())
