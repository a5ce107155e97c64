"""``publish`` and ``tail`` on a real hub; and what the supervisor and the real worker promise each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from ipc.envelope import BROADCAST, TOPIC, Envelope
from supervisor import tail
from tests.hub import Hub, acked, read_json
from tests.support import run, until


@contextmanager
def tailing(hub: Hub, pattern: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "supervisor", "tail", pattern, "--runtime-dir", hub.runtime_dir, *options],
        stdout=subprocess.PIPE,
        env=hub.env,
        cwd=hub.cwd,
    )
    try:
        until(
            lambda: any(peer["kind"] == "tail" for peer in hub.status()["peers"]), 20, "the tail on the bus"
        )
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_publish_and_tail() -> None:
    async def client(hub: Hub) -> object:
        async with await hub.connect("/ws/me") as connection:
            await acked(connection, type="subscribe", topic="a/b")
            assert hub.command("publish", "a/b", '{"x": [1, "ü"]}').returncode == 0
            received = await read_json(connection)
            await acked(connection, type="send", topic="a/c", from_client=True)
            return received

    with Hub(2) as hub, tailing(hub, "a/#") as process:
        assert run(client(hub)) == {"x": [1, "ü"]}
        assert hub.command("publish", "other", "1").returncode == 0
        assert hub.command("publish", "a", "3").returncode == 0
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert lines == [
            {"topic": "a/b", "data": {"x": [1, "ü"]}},
            {"topic": "a/c", "data": {"from_client": True}},
            {"topic": "a", "data": 3},
        ]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_publish_and_tail_reach_the_channel_that_is_named() -> None:
    with Hub(1) as hub, tailing(hub, "#", "--channel", "chat") as process:
        assert hub.command("publish", "a", "1").returncode == 0
        assert hub.command("publish", "a", "2", "--channel", "chat").returncode == 0
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"topic": "a", "data": 2}


def test_tail_ends_with_the_hub() -> None:
    with Hub(1) as hub, tailing(hub, "#") as process:
        hub.signal(signal.SIGTERM)
        hub.wait()
        assert process.wait(10) == 1
        assert not os.path.exists(hub.runtime_dir)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'{ "a" :\n [1, 2.50] }', b'{"topic":"t/\\"1","data":{"a":[1,2.50]}}\n'),
        (b"null", b'{"topic":"t/\\"1","data":null}\n'),
    ],
)
def test_a_line_of_tail_is_one_line(data: bytes, line: bytes) -> None:
    found = tail.line(Envelope(kind=TOPIC, channel="hub", topic='t/"1', data=data))
    assert found == line
    assert msgspec.json.decode(found)["topic"] == 't/"1'


def test_tail_writes_only_what_matches(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    envelopes = [
        Envelope(kind=TOPIC, channel="hub", topic=topic, data=b"1") for topic in ("a", "a/b", "b/a", "$a")
    ]
    tail.write([*envelopes, Envelope(kind=BROADCAST, channel="hub", topic="", data=b"2")], "+/b")
    assert capfdbinary.readouterr().out == b'{"topic":"a/b","data":1}\n'


def test_an_application_that_can_not_be_imported_ends_the_hub(tmp_path: Path) -> None:
    """R7 with the real worker: exit code 3, its own words last."""
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there\n")
    hub = Hub(3, app="broken:app", cwd=tmp_path, wait_ready=False)
    with hub:
        assert hub.wait() == 3
        last = hub.log().splitlines()[-1]
        assert "a_module_that_is_not_there" in last
        assert "the hub can not start" in last


def test_preloaded_application_is_served(tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text(
        "import os\n"
        "from starlette.applications import Starlette\n"
        "from starlette.responses import PlainTextResponse\n"
        "from starlette.routing import Route\n"
        "imported_by = os.getpid()\n"
        "async def who(request): return PlainTextResponse(f'{imported_by} {os.getpid()}')\n"
        "app = Starlette(routes=[Route('/', who)])\n"
    )
    with Hub(2, app="shared:app", cwd=tmp_path, options=["--preload"]) as hub:
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{hub.port}/", timeout=10) as answer:
            importer, server = map(int, answer.read().split())
        assert importer == hub.pid
        assert server in hub.worker_pids()


def test_real_workers_end_with_a_killed_supervisor() -> None:
    """R4."""
    with Hub(3) as hub:
        workers = hub.worker_pids()
        os.kill(hub.pid, signal.SIGKILL)
        hub.wait()
        until(
            lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), 10, "the end of all workers"
        )
