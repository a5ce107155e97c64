"""The held sockets and their steering, against the real kernel."""

from __future__ import annotations

import logging
import random
import socket
from collections import Counter
from collections.abc import Iterator

import pytest

from supervisor import listeners
from supervisor.listeners import AddressError, AddressInUse, ListenerGroup, format_address, steering_program


@pytest.fixture
def group() -> Iterator[ListenerGroup]:
    made = ListenerGroup("127.0.0.1", 0)
    yield made
    made.close()


def landed(group: ListenerGroup, count: int = 60) -> Counter[int]:
    """Connect so many times; how many connections each index got. All are taken from the queues."""
    clients = [socket.create_connection(("127.0.0.1", group.port)) for _ in range(count)]
    found: Counter[int] = Counter()
    for listener in group._order:
        while True:
            try:
                connection, _ = listener.socket.accept()
            except BlockingIOError:
                break
            connection.close()
            found[listener.index] += 1
    for client in clients:
        client.close()
    assert found.total() == count
    return found


def test_port_0_is_one_port_for_all(group: ListenerGroup) -> None:
    made = [group.add(index) for index in range(3)]
    assert {listener.socket.getsockname()[1] for listener in made} == {group.port}
    assert group.port > 0
    assert not any(listener.socket.get_inheritable() for listener in made)


def test_without_steering_all_get_connections(group: ListenerGroup) -> None:
    for index in range(3):
        group.add(index)
    assert set(landed(group, 150)) == {0, 1, 2}


def test_only_live_indexes_get_connections(group: ListenerGroup) -> None:
    for index in range(4):
        group.add(index)
    group.steer([1, 3])
    assert set(landed(group)) == {1, 3}
    group.steer([2])
    assert set(landed(group)) == {2}
    group.steer([0, 1, 2, 3])
    assert set(landed(group, 150)) == {0, 1, 2, 3}


def test_nobody_alive_means_all(group: ListenerGroup) -> None:
    for index in range(3):
        group.add(index)
    group.steer([1])
    group.steer([])
    assert set(landed(group, 150)) == {0, 1, 2}


def test_a_new_socket_gets_nothing_until_it_is_live(group: ListenerGroup) -> None:
    group.add(0)
    group.steer([0])
    group.add(1)
    assert set(landed(group)) == {0}
    group.steer([0, 1])
    assert set(landed(group)) == {0, 1}


def test_the_last_socket_moves_into_the_place_of_a_closed_one(group: ListenerGroup) -> None:
    """What the kernel does, and what a program that was not replaced would do: connections where nobody accepts."""
    for index in range(5):
        group.add(index)
    group.steer([2, 4])
    group.remove(1)
    assert [listener.index for listener in group._order] == [0, 4, 2, 3]
    assert set(landed(group)) == {2, 4}


def test_joins_closes_and_steering_at_random_never_misdirect(group: ListenerGroup) -> None:
    chance = random.Random(1)
    present = set(range(3))
    for index in present:
        group.add(index)
    for _ in range(60):
        if len(present) > 1 and chance.random() < 0.4:
            gone = chance.choice(sorted(present))
            group.steer(present - {gone})
            group.remove(gone)
            present.discard(gone)
        elif len(present) < 8:
            index = next(index for index in range(9) if index not in present)
            group.add(index)
            present.add(index)
        live = set(chance.sample(sorted(present), chance.randint(1, len(present))))
        group.steer(live)
        assert set(landed(group, 20)) <= live


def test_a_connection_waits_for_its_successor_when_another_holder_closes(group: ListenerGroup) -> None:
    """A worker's copy of the socket is closed (it was killed); the supervisor's keeps the queue."""
    listener = group.add(0)
    copy = listener.socket.dup()
    client = socket.create_connection(("127.0.0.1", group.port))
    assert listener.waiting() == 1
    copy.close()
    connection, _ = listener.socket.accept()
    assert listener.waiting() == 0
    connection.sendall(b"x")
    assert client.recv(1) == b"x"
    connection.close()
    client.close()


def test_failing_to_steer_is_logged_once(
    group: ListenerGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(listeners, "attach_program", refuse)
    with caplog.at_level(logging.WARNING):
        for index in range(3):
            group.add(index)
        group.steer([1])
        group.remove(0)
    assert len(caplog.records) == 1
    assert set(landed(group)) == {1, 2}


def test_address_in_use_is_seen_although_both_share_the_port() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"127.0.0.1:{port}"):
            ListenerGroup("127.0.0.1", port)


def test_foreign_and_unknown_hosts() -> None:
    with pytest.raises(AddressError, match=r"192\.0\.2\.1:80"):
        ListenerGroup("192.0.2.1", 80)
    with pytest.raises(AddressError, match="no-such-host"):
        ListenerGroup("no-such-host.invalid", 80)


def test_ipv6_and_names() -> None:
    six = ListenerGroup("::1", 0)
    try:
        six.add(0)
        six.add(1)
        six.steer([1])
        with socket.create_connection(("::1", six.port)):
            assert [listener.waiting() for listener in six._order] == [0, 1]
    finally:
        six.close()
    name = ListenerGroup("localhost", 0)
    try:
        assert name.add(0).socket.family == socket.AF_INET
    finally:
        name.close()


def test_addresses_as_in_urls() -> None:
    assert format_address("127.0.0.1", 80) == "127.0.0.1:80"
    assert format_address("::1", 80) == "[::1]:80"


def test_program_names_each_place() -> None:
    program = steering_program([3, 5, 7])
    returns = [constant for code, _, _, constant in program if code == listeners.BPF_RET_K]
    assert returns == [3, 5, 7]
    assert program[1][3] == 3  # the modulus
    assert len(steering_program(range(64))) < 4096
