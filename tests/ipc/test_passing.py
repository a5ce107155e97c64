"""Offering sockets to another process: one owner at any time, what arrives, and what does no harm."""

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
from ipc.passing import MAX_BYTES, UNANSWERED, Passing
from ipc.peer import Peer
from tests.ipc.actors import peers
from tests.support import run, until_async


class Taken:
    """What an end has taken."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.data: list[bytes] = []

    def __call__(self, sock: socket.socket, data: bytes) -> None:
        self.sockets.append(sock)
        self.data.append(data)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


def wants(data: bytes) -> bool:
    return data != b"unwanted"


class Pair:
    """Two peers' ends, of which the first offers."""

    def __init__(self, a: Peer, b: Peer) -> None:
        self.a, self.b = a, b
        self.taken = Taken()
        self.answers: list[bool] = []
        self.first = Passing(a.runtime, a.slot, wants, self.taken)
        self.second = Passing(b.runtime, b.slot, wants, self.taken)
        self.client, self.accepted = connection()

    @property
    def key(self) -> tuple[int, int]:
        return self.b.slot, self.b.epoch

    def offer(self, data: bytes, sock: socket.socket | None = None) -> bool:
        return self.first.offer(self.key, (sock or self.accepted).fileno(), data, self.answers.append)

    async def answered(self, *answers: bool) -> None:
        await until_async(lambda: len(self.answers) >= len(answers), what="answers")
        assert self.answers == list(answers)
        self.answers.clear()


@asynccontextmanager
async def ends(path: Path) -> AsyncIterator[Pair]:
    """Two ends, of which nothing is left in the end."""
    before = descriptors()
    async with peers(path / "hub", 2) as (a, b):
        pair = Pair(a, b)
        try:
            yield pair
        finally:
            pair.first.close()
            pair.second.close()
            for closing in (pair.taken, pair.client, pair.accepted):
                closing.close()
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


def test_a_socket_arrives_with_what_was_read_from_it_and_goes_on_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as pair:
            clients = []
            for number in range(40):
                client, accepted = connection()
                clients.append(client)
                assert pair.offer(b"read %d" % number, accepted)
                assert pair.first.unanswered() == pair.first.unanswered(pair.key) == number + 1
                accepted.close()
            await pair.answered(*[True] * 40)
            assert pair.first.unanswered() == 0
            assert pair.taken.data == [b"read %d" % number for number in range(40)]
            for number, (client, sock) in enumerate(zip(clients, pair.taken.sockets, strict=True)):
                assert not sock.getblocking() and not sock.get_inheritable()
                client.sendall(b"?")
                sock.setblocking(True)
                assert sock.recv(9) == b"?"
                sock.sendall(b"answer %d" % number)
                assert client.recv(99) == b"answer %d" % number
                client.close()

    run(main())


def test_what_cannot_be_offered_stays_where_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as pair:
            assert not pair.offer(bytes(MAX_BYTES + 1)), "too much"
            nobody = (pair.b.slot, pair.b.epoch + 1)
            assert not pair.first.offer(nobody, pair.accepted.fileno(), b"x", pair.answers.append)
            assert pair.offer(bytes(MAX_BYTES))
            await pair.answered(True)
            assert pair.taken.data == [bytes(MAX_BYTES)]
            pair.second.close()
            assert not pair.offer(b"x"), "it has closed"
            await until_async(lambda: not pair.first._ways)
            assert not pair.offer(b"x"), "and is not there any more"
            assert not Path(pair.b.runtime.path, passing_name(*pair.key)).exists()
            assert pair.answers == []

    run(main())


def test_what_is_not_wanted_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as pair:
            for data in (b"a", b"unwanted", b"b"):
                assert pair.offer(data)
            await pair.answered(True, False, True)
            assert pair.taken.data == [b"a", b"b"]

    run(main())


def test_who_does_not_answer_is_offered_a_bounded_number(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as pair:
            given = 0
            while pair.offer(bytes(500)):
                given += 1
            assert given == UNANSWERED
            await pair.answered(*[True] * given)
            assert pair.offer(b"again")
            await pair.answered(True)

    run(main())


def test_who_closes_answers_nobody_and_what_it_was_offered_is_not_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as pair:
            for number in range(5):
                assert pair.offer(b"%d" % number)
            pair.second.close()
            await pair.answered(*[False] * 5)
            assert pair.taken.data == []
            pair.accepted.sendall(b"still here")
            assert pair.client.recv(99) == b"still here"

    run(main())


def test_who_closes_after_offering_has_back_all_that_was_not_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with ends(tmp_path) as pair:
            assert pair.offer(b"taken")
            await until_async(lambda: pair.taken.data == [b"taken"])  # its answer may still be under way
            for number in range(5):
                assert pair.offer(b"%d" % number)
            pair.first.close()
            assert pair.answers == [True] + [False] * 5
            await until_async(lambda: not pair.second._senders, what="the other end has seen it")
            assert pair.taken.data == [b"taken"]

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


@pytest.mark.parametrize("foreign", [nothing_with_it, no_socket, too_long, too_many])
def test_what_is_not_ours_is_refused_and_the_next_is_taken(
    tmp_path: Path, foreign: Callable[[socket.socket], None]
) -> None:
    async def main() -> None:
        async with ends(tmp_path) as pair:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as way:
                way.connect(f"{pair.b.runtime.path}/{passing_name(*pair.key)}")
                foreign(way)
                socket.send_fds(way, [b"ours"], [pair.accepted.fileno()])
                await until_async(lambda: pair.taken.data == [b"ours"])
                assert [way.recv(9), way.recv(9)] == [b"\0", b"\1"]
            await until_async(lambda: not pair.second._senders, what="the end of the way")
            assert pair.offer(b"last")
            await pair.answered(True)

    run(main())


@pytest.mark.parametrize("said", [b"", b"\2", b"\1\1"])
def test_an_end_that_is_not_ours_takes_nothing(tmp_path: Path, said: bytes) -> None:
    """It closes, or it says what we do not understand, or more than it was asked."""

    async def main() -> None:
        async with ends(tmp_path) as pair:
            other = (90, 1)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(f"{pair.a.runtime.path}/{passing_name(*other)}")
                listener.listen()
                for _ in range(2):
                    assert pair.first.offer(other, pair.accepted.fileno(), b"x", pair.answers.append)
                way, _ = listener.accept()
                for byte in said:
                    way.send(bytes((byte,)))
                if said != b"\1\1":
                    if not said:
                        way.close()
                    await pair.answered(False, False)
                else:
                    await pair.answered(True, True)
                    way.send(b"\1")
                await until_async(lambda: other not in pair.first._ways)
                way.close()
            os.unlink(f"{pair.a.runtime.path}/{passing_name(*other)}")

    run(main())


def test_the_last_descriptors_are_not_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with ends(tmp_path) as pair:
            monkeypatch.setattr(module, "ceiling", lambda: 3)
            assert not pair.offer(b"x"), "not even for a way"
            monkeypatch.undo()
            assert pair.offer(b"x")
            monkeypatch.setattr(module, "ceiling", lambda: 3)
            await pair.answered(False)  # the other end has none for the way, and closes it
            monkeypatch.undo()
            assert pair.offer(b"x")
            await pair.answered(True)
            monkeypatch.setattr(module, "ceiling", lambda: 3)
            assert pair.offer(b"y")
            await pair.answered(False)
            assert pair.taken.data == [b"x"]

    run(main())


def test_without_a_descriptor_for_a_way_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with ends(tmp_path) as pair:
            listener = pair.second._listener
            refused: list[bool] = []

            class NoDescriptors:
                def fileno(self) -> int:
                    return listener.fileno()

                def accept(self) -> tuple[socket.socket, object]:
                    if not refused:
                        refused.append(True)
                        raise OSError(24, "Too many open files")
                    return listener.accept()

                def close(self) -> None:
                    listener.close()

            monkeypatch.setattr(module, "_RETRY", 0.05)
            pair.second._listener = NoDescriptors()  # type: ignore[assignment]
            assert pair.offer(b"x")
            await pair.answered(True)
            assert refused

    run(main())
