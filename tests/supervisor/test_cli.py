"""The command line, as a user has it: real processes, exit codes, words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.supervisor.fake_hub import ROOT, FakeHub
from tests.support import free_port, until
from workers.options import OPTIONS


def flockwire(
    *arguments: str, cwd: Path = ROOT, timeout: float = 30, **environ: str
) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FLOCKWIRE_")}
    return subprocess.run(
        [sys.executable, "-m", "supervisor", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), **environ},
        timeout=timeout,
    )


def refused(*arguments: str, **environ: str) -> str:
    """Exit code 2 and one line."""
    done = flockwire(*arguments, cwd=ROOT, timeout=30, **environ)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_help_shows_every_option_with_its_default() -> None:
    done = flockwire("--help", COLUMNS="200")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    for option in OPTIONS:
        assert option.flag in words
        assert f"{option.help} [default: {option.shown_default}]" in words
        assert option.shown_bounds in words
    for command in ("status", "reload", "stop", "scale", "publish", "tail", "check"):
        assert flockwire(command, "--help").returncode == 0


def test_version() -> None:
    assert flockwire("--version").stdout.startswith("flockwire, version ")


@pytest.mark.parametrize(
    "option",
    ["--dev", "--api-key", "--jwt-secret",
     "--max-connections", "--message-rate", "--connect-rate", "--forwarded-allow-ips", "--nonsense"],
)  # fmt: skip
def test_options_of_later_issues_do_not_exist(option: str) -> None:
    words = refused(option, "1")
    assert option in words


def test_errors_of_options_environment_and_toml_are_one_line(tmp_path: Path) -> None:
    assert "--port = 'x'" in refused("--port", "x")
    assert "FLOCKWIRE_PORT = 'x'" in refused(FLOCKWIRE_PORT="x")
    assert "FLOCKWIRE_PRT" in refused(FLOCKWIRE_PRT="1")
    assert "--host = '0.0.0.0'" in refused("--host", "0.0.0.0")
    (tmp_path / "hub.toml").write_text("prt = 1\n")
    assert "prt = 1" in refused("--config", str(tmp_path / "hub.toml"))
    assert "top" in refused("top")
    assert "--workers" in refused("--workers")
    assert "--workers" in refused("--workers", "3", "status")


def test_check(tmp_path: Path) -> None:
    (tmp_path / "hub.toml").write_text('port = 4321\n[topics."a/#"]\npublish = "nobody"\n')
    done = flockwire("check", "--config", str(tmp_path / "hub.toml"), "--workers", "3")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "ok"
    assert "http://127.0.0.1:4321" in done.stdout
    assert "a/#" in done.stdout
    assert flockwire("--port", "4322", "check").stdout.count("4322") >= 2
    assert "--workers = '0'" in refused("check", "--workers", "0")


@pytest.mark.parametrize(
    "command", [["status"], ["stop"], ["reload"], ["scale", "2"], ["publish", "a", "{}"], ["tail", "#"]]
)
def test_commands_without_a_hub(tmp_path: Path, command: list[str]) -> None:
    for where in (tmp_path / "none", tmp_path):
        done = flockwire(*command, "--runtime-dir", str(where))
        assert done.returncode == 1
        assert done.stderr == f"error: no hub is running in {where}\n"
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_of_commands() -> None:
    assert "x y" in refused("publish", "a", "x y")
    assert "wildcard" in refused("publish", "a/#", "{}")
    assert "JSON" in refused("publish", "a")
    assert "a/#/b" in refused("tail", "a/#/b")
    assert "scale" in refused("scale", "many") or "many" in refused("scale", "many")


def test_commands_talk_to_the_hub(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=2) as hub:
        where = ("--runtime-dir", hub.runtime_dir)
        table = flockwire("status", *where)
        assert table.returncode == 0
        assert table.stdout.startswith("ready: http://127.0.0.1:")
        answer = json.loads(flockwire("status", "--json", *where).stdout)
        assert {
            "state",
            "address",
            "pid",
            "uptime",
            "runtime_dir",
            "version",
            "settings",
            "workers",
            "totals",
        } <= set(answer)
        assert answer["pid"] == hub.pid
        keys = {
            "listener",
            "pid",
            "slot",
            "epoch",
            "state",
            "heartbeat_age",
            "connections",
            "restarts",
            "backoff",
        }
        assert all(keys <= set(worker) for worker in answer["workers"])
        before = hub.pids()
        assert flockwire("reload", FLOCKWIRE_RUNTIME_DIR=hub.runtime_dir).stdout == "2 workers new\n"
        assert not set(before.values()) & set(hub.pids().values())
        assert flockwire(*where, "scale", "3").stdout == "3 workers\n"
        too_many = flockwire("scale", "65", *where)
        assert too_many.returncode == 2
        assert "1 to 64" in too_many.stderr
        assert flockwire("stop", *where).returncode == 0
        assert not os.path.exists(hub.runtime_dir)
        assert hub.wait(5) == 0
        assert flockwire("stop", *where).returncode == 1


def test_hub_is_found_by_its_port() -> None:
    port = free_port()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FLOCKWIRE_")}
    hub = subprocess.Popen(
        [sys.executable, "-m", "tests.supervisor.fake_worker", "--port", str(port), "--workers", "1"],
        cwd=ROOT,
        env={**clean, "FAKE_DIR": "/nonexistent"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: flockwire("status", "--port", str(port)).returncode == 0 or hub.poll() is not None)
        assert hub.poll() is None
        assert flockwire("--port", str(port), "stop").returncode == 0
        assert hub.wait(10) == 0
    finally:
        hub.kill()
        hub.wait(10)


def test_start_block_and_port_0(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, "--port", "0", "--log-level", "error", workers=2)
    hub.start()
    try:
        status = hub.wait_state("ready")
        assert not status["address"].endswith(":0")
        log = hub.log()
        for words in (
            status["address"],
            "2",
            hub.runtime_dir,
            "anonymous clients: yes",
            "history",
            "bridge",
            "ready: 2",
        ):
            assert words in log
        assert "ws" + status["address"].removeprefix("http") + "/ws/{conn_id}" in log
    finally:
        hub.end()


def test_json_log(tmp_path: Path) -> None:
    with FakeHub(tmp_path, "--log-format", "json", workers=1) as hub:
        hub.signal(signal.SIGTERM)
        assert hub.wait() == 0
        lines = [json.loads(line) for line in hub.log().splitlines()]
        assert lines[0]["event"] == "start"
        assert lines[0]["endpoints"]
        assert {"time", "level", "process", "message"} <= set(lines[1])
        assert any(line["message"].startswith("ready: 1 worker on") for line in lines)


def foreign_packages(directory: Path) -> None:
    for name in ("workers", "ipc"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text("raise RuntimeError('the wrong one')\n")
        (directory / name / "settings.py").write_text("raise RuntimeError('the wrong one')\n")


def test_ours_are_imported_where_the_working_directory_has_others(tmp_path: Path) -> None:
    foreign_packages(tmp_path)
    done = flockwire("check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    program = "import sys, supervisor.__main__ as m; assert m.import_ours() is None; print(sys.path[0])"
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(tmp_path), found.stderr


@pytest.mark.parametrize("name", ["workers", "ipc"])
def test_a_foreign_package_in_our_place_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    done = flockwire("check", cwd=Path("/"), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / name) in done.stderr
    assert "not flockwire's" in done.stderr


def test_a_foreign_supervisor_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """supervisord's package has our name, and its __init__ may have been installed over ours."""
    import supervisor
    from supervisor.__main__ import import_ours

    monkeypatch.setattr(sys, "path", list(sys.path))
    assert import_ours() is None
    monkeypatch.delattr(supervisor, "__flockwire__")
    assert "'supervisor'" in (import_ours() or "")


def test_closed_standard_streams_do_no_harm(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, workers=1)
    hub.launcher = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    with hub:
        assert hub.ask_worker()[0] == 0
        hub.signal(signal.SIGTERM)
        assert hub.wait() == 0


def test_preload_with_a_thread_is_refused_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, name='my-thread', daemon=True).start()\n"
        "async def app(scope, receive, send): ...\n"
    )
    where = ("--runtime-dir", str(tmp_path / "run"), "--port", str(free_port()))
    done = flockwire("--preload", "--app", "threaded:app", *where, cwd=tmp_path)
    assert done.returncode == 3
    assert "my-thread" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_preload_of_what_can_not_be_imported(tmp_path: Path) -> None:
    where = ("--runtime-dir", str(tmp_path / "run"), "--port", str(free_port()))
    done = flockwire("--preload", "--app", "nothing_here:app", *where, cwd=tmp_path)
    assert done.returncode == 3
    assert "nothing_here" in done.stderr.splitlines()[-1]


def test_reload_option_replaces_workers_when_a_file_changes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "app.py").write_text("x = 1\n")
    hub = FakeHub(tmp_path, "--reload", workers=1)
    hub.cwd = source
    with hub:
        before = hub.pids()
        changes = iter(range(1000))

        def replaced() -> bool:
            # The watcher may begin to watch only after the first change.
            (source / "app.py").write_text(f"x = {next(changes)}\n")
            return hub.pids() not in ({}, before)

        until(replaced, 20, "a new worker")
        assert "changed: app.py" in hub.log()
        hub.signal(signal.SIGTERM)
        assert hub.wait() == 0
        until(lambda: hub.group() == [], 5, "the end of the watcher")
