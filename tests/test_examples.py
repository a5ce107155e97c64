"""Each example runs, and the README's snippets do what they say."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import websockets

from tests.hub import ROOT, Hub, acked, read_json, say
from tests.support import free_port

EXAMPLES = ROOT / "examples"


def readme_block(begin: str) -> str:
    """The fenced Python block of the README that begins like this."""
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        if str(block).startswith(begin):
            return str(block)
    raise AssertionError(f"no block begins with {begin!r}")


def test_chat_has_a_page_and_a_room() -> None:
    async def main(hub: Hub) -> None:
        with httpx.Client(trust_env=False) as http:
            page = http.get(f"http://127.0.0.1:{hub.port}/")
        assert page.status_code == 200 and "/realtime/ws" in page.text
        clients = await hub.connect_many(["/realtime/ws?topic=chat%2Flobby"] * 6)
        for client in clients:
            assert (await read_json(client))["type"] == "set_conn_id"
        await clients[0].send(json.dumps({"type": "send", "topic": "chat/lobby", "from": "a", "text": "hi"}))
        for client in clients:
            assert await read_json(client) == {"from": "a", "text": "hi"}

    with Hub(workers=2, app="chat:app", cwd=EXAMPLES) as hub:
        hub.run(main(hub))


def test_fastapi_application() -> None:
    async def main(hub: Hub) -> None:
        client = await hub.connect("/ws/anna?topic=news/1")
        with httpx.Client(trust_env=False) as http:
            answer = http.post(f"http://127.0.0.1:{hub.port}/notify/news/1", json={"n": 1})
            assert answer.json() == {"sent": True}
        assert await read_json(client) == {"n": 1}
        private = await hub.connect("/private", additional_headers={"Authorization": "Bearer abc"})
        assert await read_json(private) == {"hello": "abc"}
        with pytest.raises(websockets.InvalidStatus) as refused:
            await hub.connect("/private")
        assert refused.value.response.status_code == 403

    with Hub(workers=2, app="fastapi_app:app", cwd=EXAMPLES) as hub:
        hub.run(main(hub))


def test_publishing_script() -> None:
    async def main(hub: Hub) -> None:
        client = await hub.connect("/ws/x?topic=status/%23")
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, str(EXAMPLES / "publish.py"), hub.runtime_dir],
            capture_output=True,
            text=True,
            env=hub.env,
            timeout=20,
        )
        assert done.returncode == 0, done.stderr
        assert (await read_json(client))["done"] is True

    with Hub(workers=2) as hub:
        hub.run(main(hub))


def test_readme_client() -> None:
    with Hub(workers=2) as hub:
        code = readme_block("import asyncio, json, websockets").replace(":8000", f":{hub.port}")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=hub.env, timeout=20
        )
        assert done.stdout == '{"msg":"hello"}\n', done.stderr


def test_readme_application_and_publisher(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text(readme_block("# chat.py"))

    async def main(hub: Hub) -> None:
        a, b = await hub.connect("/ws/a?topic=room/1"), await hub.connect("/ws/b")
        await acked(b, type="subscribe", topic="room/+")
        await say(a, type="send", topic="room/1", msg="hi")
        assert await read_json(a) == await read_json(b) == {"msg": "hi"}
        with httpx.Client(trust_env=False) as http:
            http.post(f"http://127.0.0.1:{hub.port}/notify/room/1", json={"n": 2})
        assert await read_json(a) == await read_json(b) == {"n": 2}

    with Hub(workers=2, app="chat:app", cwd=tmp_path) as hub:
        hub.run(main(hub))

    async def publish(hub: Hub) -> None:
        client = await hub.connect("/ws/x?topic=room/1")
        code = readme_block("from ipc import Publisher").replace(
            "/dev/shm/flockwire-1000/8000", hub.runtime_dir
        )
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=hub.env,
            timeout=20,
        )
        assert done.returncode == 0, done.stderr
        assert await read_json(client) == {"msg": "from cron"}

    with Hub(workers=2, app="chat:app", cwd=tmp_path) as hub:
        hub.run(publish(hub))


def test_three_hosts_in_one_command() -> None:
    port = next(port for port in iter(free_port, 0) if port < 60000)
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "federation" / "run.py"), "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(3)]
        assert lines[2].startswith(f"host 3: http://127.0.0.1:{port + 2}/  (python -m supervisor status")

        async def main() -> None:
            address = "/realtime/ws/me?topic=chat%2Flobby"
            async with (
                await eventually(f"ws://127.0.0.1:{port}{address}") as here,
                await eventually(f"ws://127.0.0.1:{port + 2}{address}") as there,
            ):
                message = {"type": "send", "topic": "chat/lobby", "from": "a", "text": "hi"}
                async with asyncio.timeout(20):
                    # The other host hears from the moment on in which its bridge knows where to begin.
                    while True:
                        await here.send(json.dumps(message))
                        try:
                            async with asyncio.timeout(0.5):
                                assert json.loads(await there.recv()) == {"from": "a", "text": "hi"}
                                return
                        except TimeoutError:
                            continue

        asyncio.run(main())
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


async def eventually(url: str) -> websockets.ClientConnection:
    """Connect to a server that is about to start."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await websockets.connect(url, proxy=None)
            except OSError:
                await asyncio.sleep(0.05)
