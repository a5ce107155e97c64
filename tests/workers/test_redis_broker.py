"""The broker over Redis: the original's wire format, and a connection that comes back whatever happens."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from ipc.redis_link import redacted, retry_delays
from tests.redis_server import RedisServer, redis_server
from tests.support import free_port, run, until_async
from workers.broker_interface import BrokerError, BrokerUnavailable
from workers.message import InvalidMessage, Message
from workers.redis_broker import RedisBroker, decode_message, encode_message


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


@pytest.fixture
def plain(server: RedisServer) -> Iterator[Any]:
    """A plain client of the same Redis, as another program would use."""
    with redis.Redis(port=server.port) as client:
        yield client


def message(text: str, topic: str = "a/b") -> dict[str, Any]:
    return {"type": "send", "topic": topic, "conn_id": None, "text": text}


def kill_pubsub(plain: Any) -> None:
    plain.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


# The wire format


def test_a_published_message_is_one_flat_json_object(server: RedisServer, plain: Any) -> None:
    listener = plain.pubsub()
    listener.subscribe("chat")
    listener.get_message(timeout=5)

    async def main() -> None:
        async with RedisBroker(server.url) as broker:
            await broker.publish("chat", {"type": "send", "topic": "a/b", "text": "hi"})
            await broker.publish("chat", Message(type="broadcast", data={"n": 1}))

    run(main())
    first, second = (json.loads(listener.get_message(timeout=5)["data"]) for _ in range(2))
    assert first == {"type": "send", "topic": "a/b", "conn_id": None, "text": "hi"}
    assert second == {"type": "broadcast", "topic": None, "conn_id": None, "n": 1}
    listener.close()


def test_what_an_old_process_publishes_comes_as_a_message(server: RedisServer, plain: Any) -> None:
    async def main() -> Message | None:
        async with RedisBroker(server.url) as broker:
            await broker.subscribe("chat")
            plain.publish("chat", json.dumps({"type": "send", "topic": "ä/b", "conn_id": None, "text": "hé"}))
            return await broker.get_message(timeout=5)

    assert run(main()) == Message(type="send", topic="ä/b", data={"text": "hé"})


@pytest.mark.parametrize(
    "value", [2**70, -(2**63), 1.5, None, "\ud7ff\x00", [[]], {"a": {"b": True}}, "x" * 100_000]
)
def test_every_json_value_travels_unchanged(value: object) -> None:
    sent = Message(type="send", topic="a", data={"value": value})
    assert decode_message(encode_message(sent)) == sent


def test_the_dict_that_is_published_is_not_changed() -> None:
    given = {"type": "broadcast", "x": 1}
    encode_message(given)
    assert given == {"type": "broadcast", "x": 1}


def test_a_message_without_a_type_is_not_published() -> None:
    with pytest.raises(ValueError, match="needs a type"):
        encode_message({"topic": "a"})


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"hello",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"type":5}',
        b'{"type":"active_connections"}',
        b"[" * 100_000,
    ],
)
def test_a_foreign_payload_is_refused_in_words(payload: bytes) -> None:
    with pytest.raises(InvalidMessage):
        decode_message(payload)


# Messages


def test_messages_keep_their_order_and_concurrent_publishers_theirs(server: RedisServer) -> None:
    async def main() -> list[str]:
        async with RedisBroker(server.url) as broker:
            await broker.subscribe("chat")
            await asyncio.gather(*(broker.publish("chat", message(str(n))) for n in range(500)))
            return [
                received.data["text"] for _ in range(500) if (received := await broker.get_message(timeout=5))
            ]

    assert run(main()) == [str(n) for n in range(500)]


def test_nothing_published_after_subscribe_returned_is_missed(server: RedisServer, plain: Any) -> None:
    async def main() -> None:
        for number in range(30):
            async with RedisBroker(server.url) as broker:
                await broker.subscribe("chat")
                plain.publish("chat", json.dumps(message(str(number))))
                assert await broker.get_message(timeout=5) == Message(
                    type="send", topic="a/b", data={"text": str(number)}
                )

    run(main())


def test_channels_are_separate_and_can_be_left(server: RedisServer, plain: Any) -> None:
    async def main() -> None:
        async with RedisBroker(server.url) as broker:
            await broker.subscribe("one")
            await broker.subscribe("two")
            await broker.unsubscribe("one")
            await broker.unsubscribe("never subscribed")
            await until_async(lambda: plain.pubsub_numsub("one")[0][1] == 0)
            plain.publish("one", json.dumps(message("one")))
            plain.publish("three", json.dumps(message("three")))
            plain.publish("two", json.dumps(message("two")))
            received = await broker.get_message(timeout=5)
            assert received is not None
            assert received.data == {"text": "two"}
            await broker.unsubscribe("two")
            await until_async(lambda: plain.pubsub_numsub("two")[0][1] == 0)
            await broker.subscribe("three")
            await broker.publish("three", message("again"))
            received = await broker.get_message(timeout=5)
            assert received is not None
            assert received.data == {"text": "again"}

    run(main())


def test_foreign_payloads_are_counted_logged_once_and_passed_over(
    server: RedisServer, plain: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> RedisBroker:
        async with RedisBroker(server.url) as broker:
            await broker.subscribe("chat")
            for payload in (
                b"hello",
                b"\xff",
                b'{"type":"shutdown"}',
                b"[" * 100_000,
                json.dumps(message("good")),
            ):
                plain.publish("chat", payload)
            assert await broker.get_message(timeout=5) == Message(
                type="send", topic="a/b", data={"text": "good"}
            )
            return broker

    broker = run(main())
    assert broker.ignored == 4
    assert broker.breaks == 0
    assert len([record for record in caplog.records if "foreign" in record.message]) == 1


def test_get_message_returns_none_when_the_time_is_over(server: RedisServer) -> None:
    async def main() -> None:
        async with RedisBroker(server.url) as broker:
            await broker.subscribe("chat")
            assert await broker.get_message(timeout=0) is None
            assert await broker.get_message(timeout=0.05) is None

    run(main())


def test_an_idle_broker_reads_only_to_see_that_redis_lives(server: RedisServer, plain: Any) -> None:
    async def main() -> None:
        async with RedisBroker(server.url, health_check_interval=0.1) as broker:
            await broker.subscribe("chat")
            waiting = asyncio.create_task(broker.get_message())

            def pings() -> int:
                stats: dict[str, Any] = plain.info("commandstats")
                return int(stats.get("cmdstat_ping", {}).get("calls", 0))

            before = pings()
            await until_async(lambda: pings() >= before + 4)
            # Two reads for each ping, one that waits in vain and one for the answer; the start takes two.
            assert broker.reads <= 2 * (pings() - before) + 4
            waiting.cancel()

    run(main())


# Breaks


def test_after_a_crash_of_redis_it_listens_and_publishes_again(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with RedisBroker(server.url) as broker:
            await broker.subscribe("one")
            await broker.subscribe("two")
            server.stop()
            await until_async(lambda: broker.breaks == 1)
            await asyncio.to_thread(server.start)
            with redis.Redis(port=server.port) as plain:
                await until_async(lambda: dict(plain.pubsub_numsub("one", "two")) == {b"one": 1, b"two": 1})
            for channel in ("one", "two"):
                await broker.publish(channel, message(channel))
                received = await broker.get_message(timeout=5)
                assert received is not None
                assert received.data == {"text": channel}

    run(main())
    assert "missed" in caplog.text


def test_killed_connections_are_made_again(server: RedisServer, plain: Any) -> None:
    async def main() -> None:
        async with RedisBroker(server.url) as broker:
            await broker.subscribe("chat")
            for number in range(3):
                kill_pubsub(plain)
                plain.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await until_async(lambda: broker.breaks == number + 1)  # noqa: B023
                await until_async(lambda: plain.pubsub_numsub("chat")[0][1] == 1)
                await broker.publish("chat", message(str(number)))
                received = await broker.get_message(timeout=5)
                assert received is not None
                assert received.data == {"text": str(number)}

    run(main())


def test_a_dead_link_is_noticed_by_a_ping_without_an_answer(server: RedisServer) -> None:
    async def main() -> None:
        async with RedisBroker(server.url, health_check_interval=0.2) as broker:
            await broker.subscribe("chat")
            server.pause()
            await until_async(lambda: broker.breaks == 1)
            assert not broker.listening
            server.resume()
            await until_async(lambda: broker.listening)
            await broker.publish("chat", message("back"))
            received = await broker.get_message(timeout=5)
            assert received is not None
            assert received.data == {"text": "back"}

    run(main())


def test_publishing_without_redis_fails_in_words_and_within_its_time(server: RedisServer) -> None:
    async def main() -> None:
        async with RedisBroker(server.url, publish_timeout=0.3) as broker:
            server.stop()
            results = await asyncio.gather(
                *(broker.publish("chat", message(str(n))) for n in range(20)), return_exceptions=True
            )
            assert all(isinstance(result, BrokerUnavailable) for result in results)
            assert all(isinstance(result, ConnectionError) for result in results)
            with pytest.raises(BrokerUnavailable, match=rf"127.0.0.1:{server.port}.*not published"):
                await broker.publish("chat", message("x"))
            with pytest.raises(BrokerUnavailable, match="'late' is not subscribed"):
                await broker.subscribe("late")

    run(main(), timeout=10)


def test_a_message_published_while_redis_restarts_is_sent_when_it_is_back(server: RedisServer) -> None:
    async def main() -> None:
        async with RedisBroker(server.url, publish_timeout=10) as broker:
            await broker.subscribe("chat")
            server.stop()
            await until_async(lambda: broker.breaks == 1)
            publishing = asyncio.create_task(broker.publish("other", message("kept")))
            await asyncio.to_thread(server.start)
            await publishing

    run(main())


def test_a_redis_that_is_not_there_is_told_at_connect() -> None:
    async def main() -> None:
        broker = RedisBroker(f"redis://user:secret@127.0.0.1:{free_port()}", publish_timeout=0.2)
        with pytest.raises(BrokerUnavailable, match="not connected") as caught:
            await broker.connect()
        assert "secret" not in str(caught.value)

    run(main())


def test_a_wrong_password_is_told_at_once_and_a_right_one_works(tmp_path: Path) -> None:
    async def main(port: int) -> None:
        with pytest.raises(BrokerUnavailable, match="refuses the login"):
            await RedisBroker(f"redis://:wrong@127.0.0.1:{port}").connect()
        async with RedisBroker(f"redis://:right@127.0.0.1:{port}") as broker:
            await broker.subscribe("chat")
        async with RedisBroker(f"redis://127.0.0.1:{port}", password="right") as broker:
            await broker.publish("chat", message("x"))

    with redis_server(tmp_path, "--requirepass", "right") as running:
        run(main(running.port))


def test_what_redis_forbids_is_an_error_and_not_a_broken_broker(server: RedisServer, plain: Any) -> None:
    plain.execute_command("ACL", "SETUSER", "bob", "on", ">pw", "+@all", "resetchannels", "&mine")

    async def main() -> None:
        async with RedisBroker(f"redis://bob:pw@127.0.0.1:{server.port}", publish_timeout=1) as broker:
            with pytest.raises(BrokerUnavailable, match="(?i)permission"):
                await broker.subscribe("theirs")
            with pytest.raises(BrokerError, match="(?i)permission"):
                await broker.publish("theirs", message("x"))
            await broker.subscribe("mine")
            await broker.publish("mine", message("x"))
            assert await broker.get_message(timeout=5) is not None

    run(main())


# Life and addresses


def test_it_can_be_connected_again_and_leaves_no_connection_behind(server: RedisServer, plain: Any) -> None:
    def clients() -> int:
        return len(plain.client_list())

    async def main() -> None:
        broker = RedisBroker(server.url)
        for _ in range(2):
            await broker.connect()
            await broker.connect()
            await broker.subscribe("chat")
            await broker.publish("chat", message("x"))
            assert await broker.get_message(timeout=5) is not None
            await broker.disconnect()
            await broker.disconnect()
        await until_async(lambda: clients() == 1)
        assert len(asyncio.all_tasks()) == 1

    run(main())


def test_a_waiting_get_message_ends_with_the_broker(server: RedisServer) -> None:
    async def main() -> None:
        broker = RedisBroker(server.url)
        await broker.connect()
        waiting = [asyncio.create_task(broker.get_message()) for _ in range(3)]
        await asyncio.sleep(0)
        await broker.disconnect()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, BrokerError) for result in results)
        for call in (broker.get_message(), broker.subscribe("a"), broker.unsubscribe("a")):
            with pytest.raises(BrokerError, match="connect"):
                await call
        with pytest.raises(BrokerError, match="connect"):
            await broker.publish("a", message("x"))

    run(main())


def test_a_reader_that_does_not_take_messages_holds_up_to_a_bound(
    server: RedisServer, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.redis_broker.MAX_WAITING", 10)

    async def main() -> None:
        async with RedisBroker(server.url) as broker:
            await broker.subscribe("chat")
            for number in range(50):
                plain.publish("chat", json.dumps(message(str(number))))
            await until_async(lambda: broker._inbox is not None and broker._inbox.full())
            for number in range(50):
                received = await broker.get_message(timeout=5)
                assert received is not None
                assert received.data == {"text": str(number)}

    run(main())


def test_a_unix_socket_works(server: RedisServer) -> None:
    async def main() -> None:
        async with RedisBroker(f"unix://{server.socket_path}") as broker:
            await broker.subscribe("chat")
            await broker.publish("chat", message("x"))
            assert await broker.get_message(timeout=5) is not None

    run(main())


def test_tls_works_and_checks_the_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    port = free_port()
    files = {"cert-file": "server.pem", "key-file": "server.pem", "ca-cert-file": "ca.pem"}
    options = [word for name, file in files.items() for word in (f"--tls-{name}", str(tmp_path / file))]

    async def main() -> None:
        url = f"rediss://localhost:{port}"
        async with RedisBroker(url, ssl_ca_certs=str(tmp_path / "ca.pem")) as broker:
            await broker.subscribe("chat")
            await broker.publish("chat", message("x"))
            assert await broker.get_message(timeout=5) is not None
        with pytest.raises(BrokerUnavailable, match="(?i)certificate"):
            await RedisBroker(url, publish_timeout=0.3).connect()

    with redis_server(tmp_path, "--tls-port", str(port), "--tls-auth-clients", "no", *options):
        run(main())


def test_options_in_the_address_cannot_change_how_it_talks(server: RedisServer) -> None:
    async def main() -> None:
        async with RedisBroker(
            f"{server.url}?decode_responses=true&protocol=3&health_check_interval=1"
        ) as broker:
            await broker.subscribe("chat")
            await broker.publish("chat", message("x"))
            assert await broker.get_message(timeout=5) is not None

    run(main())


def test_other_addresses_are_refused_without_their_password() -> None:
    with pytest.raises(ValueError, match="redis://, rediss:// or unix://") as caught:
        RedisBroker("http://user:secret@example.com/")
    assert "secret" not in str(caught.value)
    assert redacted("rediss://user:pa@ss@host:1/0?password=x") == "rediss://host:1"
    assert redacted("unix://user:pw@/run/redis.sock?db=1") == "unix:///run/redis.sock"


def test_a_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'redis\[hiredis\]"):
        RedisBroker("redis://127.0.0.1")


def test_delays_grow_are_jittered_and_stay_within_their_bound() -> None:
    many = [list(itertools.islice(retry_delays(), 12)) for _ in range(50)]
    assert all(0.05 <= delays[0] <= 0.1 for delays in many)
    assert all(2.5 <= delay <= 5.0 for delays in many for delay in delays[6:])
    assert len({delays[-1] for delays in many}) > 40
