"""The publishing side of federation: numbers, what waits for a bridge, and hosts without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ipc import envelope as wire
from ipc.envelope import BROADCAST, DIRECT, Envelope, Header
from ipc.flow import BACKLOG
from ipc.origins import shard_of
from ipc.peer import Counter, Peer, PeerKind
from ipc.rules import Rules, TopicRule
from tests.ipc.actors import Inbox, open_peer, topic
from tests.support import run, until_async

RULES = Rules(federate=("#",), topics={"private/#": TopicRule(federate=False)})


class TakeOver:
    """What a bridge does with what comes: it keeps it, and acknowledges when told to."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.releases: list[Callable[[], None]] = []

    def __call__(self, header: Header, envelopes: list[Envelope], release: Callable[[], None]) -> None:
        self.envelopes += envelopes
        self.releases.append(release)

    @property
    def data(self) -> list[bytes]:
        return [envelope.data for envelope in self.envelopes]


async def member(path: Path, *, backlog: int = BACKLOG) -> Peer:
    peer = await Peer._open(str(path), PeerKind.APPLICATION, None, RULES, backlog)
    peer._users = 1
    return peer


async def bridge(path: Path, take_over: TakeOver) -> Peer:
    peer = await Peer._open(str(path), PeerKind.BRIDGE, None, None, BACKLOG, take_over)
    peer._users = 1
    return peer


def numbered(count: int, name: str = "a") -> list[Envelope]:
    return [topic(name, b"%d" % number) for number in range(count)]


def test_what_is_published_without_a_bridge_waits_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        peer = await member(tmp_path / "hub")
        for envelope in numbered(100):
            peer.publish(envelope)
        await until_async(lambda: peer.record.get(Counter.FEDERATION_HELD) > 0)
        taken = TakeOver()
        second = await bridge(tmp_path / "hub", taken)
        await until_async(lambda: len(taken.envelopes) == 100)
        assert taken.data == [b"%d" % number for number in range(100)]
        assert [envelope.origin for envelope in taken.envelopes] == [
            ("", peer.slot, peer.epoch, number + 1) for number in range(100)
        ]
        assert peer.record.get(Counter.FEDERATION_HELD) == 0
        await second.close()
        await peer.close()

    run(main())


def test_a_successor_gets_what_was_not_acknowledged(tmp_path: Path) -> None:
    async def main() -> None:
        peer = await member(tmp_path / "hub")
        first, second = TakeOver(), TakeOver()
        one = await bridge(tmp_path / "hub", first)
        for envelope in numbered(10):
            peer.publish(envelope)
        await until_async(lambda: len(first.envelopes) == 10)
        for release in first.releases:
            release()
        for envelope in numbered(5, "b"):
            peer.publish(envelope)
        await until_async(lambda: len(first.envelopes) == 15)
        one._end()  # as if it was killed
        for envelope in numbered(5, "c"):
            peer.publish(envelope)
        two = await bridge(tmp_path / "hub", second)
        await until_async(lambda: len(second.envelopes) == 10)
        assert [envelope.topic for envelope in second.envelopes] == ["b"] * 5 + ["c"] * 5
        assert peer.record.get(Counter.FEDERATION_DROPPED) == 0
        await two.close()
        await peer.close()

    run(main())


def test_what_waits_is_bounded_and_what_is_dropped_counted(tmp_path: Path) -> None:
    async def main() -> None:
        peer = await member(tmp_path / "hub", backlog=100_000)
        for _ in range(30):
            peer.publish(topic("a", bytes(10_000)))
        taken = TakeOver()
        await until_async(lambda: peer.record.get(Counter.FEDERATION_DROPPED) > 0)
        assert not peer.congested
        second = await bridge(tmp_path / "hub", taken)
        await until_async(lambda: len(taken.envelopes) + peer.record.get(Counter.FEDERATION_DROPPED) == 30)
        await second.close()
        await peer.close()

    run(main())


def test_what_is_left_when_a_publisher_leaves_is_counted(tmp_path: Path) -> None:
    async def main() -> None:
        peer = await member(tmp_path / "hub")
        other = await open_peer(tmp_path / "hub")
        for envelope in numbered(7):
            peer.publish(envelope)
        record = peer.runtime.board.record(peer.slot)
        slot = peer.slot
        await peer.close()
        assert other.runtime.board.record(slot).get(Counter.FEDERATION_DROPPED) == 7
        del record
        await other.close()

    run(main())


def test_numbers_count_per_shard_what_leaves_the_host_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        peer = await member(tmp_path / "hub")
        names = ["a", "private/x", "b", "a", "$sys", "b"]
        envelopes = [topic(name) for name in names]
        envelopes.append(Envelope(BROADCAST, "hub", "", b"{}"))
        envelopes.append(Envelope(DIRECT, "hub", "", b"{}", ("anna",)))
        expected: list[int | None] = []
        counts: dict[int, int] = {}
        for envelope in envelopes:
            if envelope.topic in ("private/x", "$sys"):
                expected.append(None)
                continue
            shard = shard_of("hub", envelope.topic)
            counts[shard] = counts.get(shard, 0) + 1
            expected.append(counts[shard])
        for envelope in envelopes:
            peer.publish(envelope)
        assert [e.origin[3] if e.origin else None for e in envelopes] == expected
        try:
            peer.publish(topic("a", bytes(wire.MAX_ENVELOPE)))
        except wire.EnvelopeTooBig:
            pass
        following = topic("a")
        peer.publish(following)
        assert following.origin is not None
        assert following.origin[3] == counts[shard_of("hub", "a")] + 1
        await peer.close()

    run(main())


def test_a_message_of_another_host_is_delivered_once_and_never_sent_out(tmp_path: Path) -> None:
    async def main() -> None:
        taken = TakeOver()
        peer = await member(tmp_path / "hub")
        inbox = Inbox(peer)
        peer.interest_add(0, "hub", "a")  # type: ignore[arg-type]
        one = await bridge(tmp_path / "hub", taken)
        for number in (1, 2, 2, 1, 3):
            one.publish(Envelope(0, "hub", "a", b"%d" % number, origin=("other.1:0", 5, 1, number)))
        await until_async(lambda: len(inbox.data) == 3)
        assert inbox.data == [b"1", b"2", b"3"]
        assert peer.record.get(Counter.FEDERATION_DUPLICATES) == 2
        assert taken.envelopes == []
        await one.close()
        await peer.close()

    run(main())


def test_without_a_bridge_in_the_rules_there_is_nothing_of_it(tmp_path: Path) -> None:
    async def main() -> None:
        peer = await open_peer(tmp_path / "hub")
        envelope = topic("a")
        peer.publish(envelope)
        assert envelope.origin is None
        assert peer.bus.outbound.federation is None
        await peer.close()

    run(main())


def test_what_a_living_bridge_was_sent_is_not_dropped_when_its_sender_leaves(tmp_path: Path) -> None:
    """Redis is away, so nothing is acknowledged; the bridge has it all the same."""

    async def main() -> None:
        peer, taken = await member(tmp_path / "hub"), TakeOver()
        second = await bridge(tmp_path / "hub", taken)
        for envelope in numbered(50):
            peer.publish(envelope)
        slot = peer.slot
        await peer.close()
        await until_async(lambda: len(taken.envelopes) == 50)
        assert second.runtime.board.record(slot).get(Counter.FEDERATION_DROPPED) == 0
        await second.close()

    run(main())
