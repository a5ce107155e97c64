"""The official JavaScript client (npm `centrifuge`) against a hub with four workers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.support import HOOKED, RULES, address, finish, needs_node, node
from tests.hub import Hub
from tests.support import free_port, scratch_directory

pytestmark = [needs_node, pytest.mark.xdist_group("javascript")]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub(workers=4, config=RULES, app=HOOKED) as running:
        yield running


@pytest.mark.parametrize(
    "scenario",
    [
        "connect",
        "crossing",
        "wildcard",
        "presence",
        "history",
        "rpc",
        "unsubscribe",
        "storm",
        "overrun",
        "serverside",
        "limits",
    ],
)
def test_scenario(hub: Hub, scenario: str) -> None:
    finish(node("scenarios.mjs", address(hub.port), scenario))


def test_a_client_that_answers_no_ping_is_closed() -> None:
    with Hub(workers=1, options=["--ping-interval", "1", "--ping-timeout", "0.5"]) as hub:
        finish(node("scenarios.mjs", address(hub.port), "silence"))


def test_a_reload_sends_clients_away_with_3001_and_they_come_back() -> None:
    with Hub(workers=2) as hub:
        process = node("scenarios.mjs", address(hub.port), "drain")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert hub.command("reload").returncode == 0
        finish(process)


@pytest.mark.parametrize("kept", [False, True], ids=["lost", "kept"])
def test_after_a_restart_the_new_epoch_tells_what_cannot_be_recovered(tmp_path: Path, kept: bool) -> None:
    """Item 5: without its old store a hub says ``recovered: false``, with it (``--data-dir``) nothing is missed."""
    port, directory = free_port(), Path(scratch_directory())
    options = ["--data-dir", str(tmp_path / "data")] if kept else []
    try:
        with Hub(2, config=RULES, options=options, port=port, runtime_dir=str(directory / "run")):
            process = node("scenarios.mjs", address(port), "restart", "kept" if kept else "lost")
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        shutil.rmtree(directory / "run", ignore_errors=True)
        with Hub(2, config=RULES, options=options, port=port, runtime_dir=str(directory / "run")):
            finish(process, text="go\n")
    finally:
        shutil.rmtree(directory)
