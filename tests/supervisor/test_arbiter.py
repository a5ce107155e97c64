"""The supervisor with real processes and fake workers: lives, deaths, reloads, signals."""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import pytest

from ipc.runtime import RuntimeDir
from supervisor.control import ask
from supervisor.flock import Flock
from supervisor.listeners import ListenerGroup
from supervisor.restart import Clockwork
from supervisor.worker_process import WorkerProcess
from tests.supervisor.fake_hub import ROOT, FakeHub
from tests.support import until
from workers.settings import load_settings


def test_every_worker_serves_and_an_ordered_stop_leaves_nothing(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=3) as hub:
        assert {hub.ask_worker()[0] for _ in range(60)} == {0, 1, 2}
        hub.signal(signal.SIGTERM)
        assert hub.wait() == 0
        assert hub.group() == []
        assert not os.path.exists(hub.runtime_dir)
        assert hub.log().count("ready: 3 workers") == 1


def test_fork_discipline(tmp_path: Path) -> None:
    """R16: one thread, no event loop, no ZeroMQ, no LMDB; a child has nothing of the supervisor's."""
    with FakeHub(tmp_path, workers=3) as hub:
        for note in hub.born():
            assert note["threads"] == 1
            assert note["modules"] == []
            assert note["ppid"] == hub.pid
            assert note["runtime_dir"] == hub.runtime_dir
            assert note["ignored"] == ["INT", "QUIT", "HUP"]
            others = [link for fd, link in note["descriptors"].items() if int(fd) > 2 and link != "closed"]
            assert len([link for link in others if link.startswith("socket:")]) == 2, others
            # The directory that the list itself was read from is the only other one.
            assert len(others) <= 3, others


def test_killed_worker_is_replaced_and_nobody_else_notices(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=3) as hub:
        before = hub.pids()
        os.kill(before[1], signal.SIGKILL)
        hub.wait_status(lambda status: hub.pids().get(1) not in (None, before[1]), what="a new worker 1")
        after = hub.pids()
        assert (after[0], after[2]) == (before[0], before[2])
        assert "was killed by SIGKILL; perhaps out of memory?" in hub.log()
        hub.wait_state("ready")
        assert next(w for w in hub.status()["workers"] if w["listener"] == 1)["restarts"] == 1


def test_connections_queued_at_a_killed_worker_are_served_by_its_successor(tmp_path: Path) -> None:
    """R1: 200 connections wait while the one worker is stopped, then killed; none is reset."""
    with FakeHub(tmp_path, workers=1) as hub:
        pid = hub.pids()[0]
        os.kill(pid, signal.SIGSTOP)
        waiting = [socket.create_connection(("127.0.0.1", hub.port), 10) for _ in range(200)]
        os.kill(pid, signal.SIGKILL)
        answers = []
        for connection in waiting:
            with connection:
                connection.settimeout(15)
                answers.append(connection.recv(100))
        assert len(answers) == 200
        assert all(answer.split()[1] != str(pid).encode() for answer in answers if answer)
        assert all(answers)


def test_stopped_worker_is_steered_away_from_then_killed(tmp_path: Path) -> None:
    """R2: no heartbeat for 2 s: no new connections; for --worker-timeout: SIGABRT, then SIGKILL."""
    with FakeHub(tmp_path, "--worker-timeout", "3", workers=4) as hub:
        before = hub.pids()
        stopped_at = time.monotonic()
        os.kill(before[2], signal.SIGSTOP)
        hub.wait_status(lambda s: any(w["state"] == "stale" for w in s["workers"]), 5, "a stale worker")
        assert time.monotonic() - stopped_at < 3.0
        answered = {hub.ask_worker(1.0)[1] for _ in range(200)}
        assert before[2] not in answered
        assert len(answered) == 3
        hub.wait_status(lambda s: len(hub.pids()) == 4, 10, "four workers")
        assert hub.pids()[2] != before[2]
        assert "SIGABRT" in hub.log()


def test_worker_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, "--boot-timeout", "0.3", workers=1)
    (hub.orders / "hang").touch()
    hub.start()
    try:
        assert hub.wait() == 3
        assert len(hub.born()) == 5
        assert "was not ready within 0.3 s" in hub.log()
        assert hub.group() == []
    finally:
        hub.end()


def test_worker_that_can_not_start_ends_the_hub_with_its_words_last(tmp_path: Path) -> None:
    """R7: exit code 3 before all were ready."""
    hub = FakeHub(tmp_path, workers=4)
    (hub.orders / "fail").write_text("no module named 'nothing'")
    hub.start()
    try:
        assert hub.wait() == 3
        assert hub.log().splitlines()[-1].endswith("the hub can not start: no module named 'nothing'")
        assert hub.group() == []
        assert not os.path.exists(hub.runtime_dir)
    finally:
        hub.end()


def test_five_failed_starts_end_the_hub(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, workers=1)
    (hub.orders / "exit").write_text("7")
    hub.start()
    try:
        assert hub.wait() == 3
        assert len(hub.born()) == 5
        assert "ended with exit code 7" in hub.log().splitlines()[-1]
    finally:
        hub.end()


def test_crash_loop_backs_off_and_shows(tmp_path: Path) -> None:
    """R7: crashes soon after being ready; the hub stays, degraded, and the delays grow."""
    with FakeHub(tmp_path, workers=1) as hub:
        (hub.orders / "crash").write_text("0.1")
        os.kill(hub.pids()[0], signal.SIGKILL)
        hub.wait_status(lambda s: s["workers"][0]["backoff"] > 2.5 and s["state"] == "degraded", 15)
        starts = [note["time"] for note in hub.born()]
        gaps = [later - earlier for earlier, later in zip(starts[1:], starts[2:], strict=False)]
        assert len(starts) == 4, starts
        assert gaps[0] == pytest.approx(1.1, abs=0.7)
        assert gaps[1] == pytest.approx(2.1, abs=0.7)
        (hub.orders / "crash").unlink()
        hub.wait_state("ready")


def test_exit_code_3_after_the_start_does_not_end_the_hub(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=2) as hub:
        (hub.orders / "fail").write_text("the database is away")
        os.kill(hub.pids()[0], signal.SIGKILL)
        hub.wait_status(lambda s: s["state"] == "degraded" and s["workers"][0]["backoff"] > 0)
        assert hub.ask_worker()[0] == 1
        (hub.orders / "fail").unlink()
        hub.wait_state("ready")


def test_reload_replaces_everybody_and_no_connection_fails(tmp_path: Path) -> None:
    """R6: connections all the time; never fewer than all workers ready."""
    with FakeHub(tmp_path, workers=3) as hub:
        before = set(hub.pids().values())
        hub.signal(signal.SIGHUP)
        seen = set()
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            seen.add(hub.ask_worker()[1])
            ready = hub.pids()
            assert len(ready) == 3
            if not before & set(ready.values()):
                break
        assert not before & set(hub.pids().values())
        assert "reload: done" in hub.log()


def test_hup_during_hup_is_remembered_once(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=2) as hub:
        for _ in range(20):
            hub.signal(signal.SIGHUP)
        until(lambda: hub.log().count("reload: done") >= 1, 15)
        rounds = hub.log().count("reload: 2 workers")
        assert 1 <= rounds <= 3
        hub.wait_state("ready")


def test_reload_whose_successor_fails_keeps_the_predecessor(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=2) as hub:
        before = hub.pids()
        (hub.orders / "fail").write_text("syntax error")
        answer = ask(hub.runtime_dir, {"command": "reload"}, 15)
        assert answer is not None
        assert answer["ok"] is False
        assert "syntax error" in answer["error"]
        assert hub.pids() == before
        assert hub.status()["state"] == "ready"
        assert "the running workers stay" in hub.log()
        (hub.orders / "fail").unlink()
        assert ask(hub.runtime_dir, {"command": "reload"}, 15) == {"ok": True, "workers": 2}
        assert not set(before.values()) & set(hub.pids().values())


def test_scale_up_and_down_without_a_lost_connection(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=2) as hub:
        assert ask(hub.runtime_dir, {"command": "scale", "workers": 5}, 15) == {"ok": True, "workers": 5}
        assert {hub.ask_worker()[0] for _ in range(200)} == {0, 1, 2, 3, 4}
        done = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "scale", "1", "--runtime-dir", hub.runtime_dir], cwd=ROOT
        )
        while done.poll() is None:
            hub.ask_worker()
        assert done.returncode == 0
        assert {hub.ask_worker()[0] for _ in range(50)} == {0}
        assert list(hub.pids()) == [0]


def test_scale_out_of_range_is_refused(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=1) as hub:
        for workers in (0, 65):
            answer = ask(hub.runtime_dir, {"command": "scale", "workers": workers}, 15)
            assert answer is not None
            assert "1 to 64" in answer["error"]
        hub.signal(signal.SIGTTOU)
        until(lambda: "must be an integer from 1 to 64" in hub.log())


def test_ttin_and_ttou(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=1) as hub:
        hub.signal(signal.SIGTTIN)
        hub.wait_status(lambda s: len(hub.pids()) == 2)
        hub.signal(signal.SIGTTOU)
        hub.wait_status(lambda s: len(s["workers"]) == 1)


def test_direct_term_of_a_worker_brings_its_successor_at_once(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=2) as hub:
        before = hub.pids()
        os.kill(before[0], signal.SIGTERM)
        hub.wait_status(lambda s: hub.pids().get(0) not in (None, before[0]))
        hub.wait_state("ready")


def test_worker_that_does_not_drain_is_killed_and_the_exit_code_is_still_0(tmp_path: Path) -> None:
    with FakeHub(tmp_path, "--drain-timeout", "0.2", workers=2) as hub:
        (hub.orders / "deaf").touch()
        hub.signal(signal.SIGTERM)
        hub.signal(signal.SIGTERM)
        assert hub.wait() == 0
        assert "has not drained in time: SIGKILL" in hub.log()
        assert hub.group() == []
        assert not os.path.exists(hub.runtime_dir)


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGINT] * 2, 130), ([signal.SIGQUIT], 131)])
def test_end_at_once(tmp_path: Path, signals: list[signal.Signals], code: int) -> None:
    with FakeHub(tmp_path, workers=2) as hub:
        (hub.orders / "deaf").touch()
        for signum in signals:
            hub.signal(signum)
            until(lambda: hub.has_ended() or "stopping" in hub.log())
        assert hub.wait(5) == code
        assert hub.group() == []
        assert not os.path.exists(hub.runtime_dir)


def test_death_of_the_supervisor_ends_the_workers(tmp_path: Path) -> None:
    """R4: no process survives, and the next start works in the same directory and on the same port."""
    with FakeHub(tmp_path, workers=3) as hub:
        os.kill(hub.pid, signal.SIGKILL)
        hub.wait()
        until(lambda: hub.group() == [], 5, "the end of all workers")
        with FakeHub(tmp_path, workers=1, port=hub.port) as next_hub:
            assert next_hub.ask_worker()[0] == 0
            next_hub.signal(signal.SIGTERM)
            assert next_hub.wait() == 0
        assert not os.path.exists(hub.runtime_dir)


def test_start_waits_for_the_orphans_of_a_killed_supervisor(tmp_path: Path) -> None:
    with FakeHub(tmp_path, workers=1) as hub:
        (hub.orders / "deaf").touch()
        os.kill(hub.pid, signal.SIGKILL)
        hub.wait()
        next_hub = FakeHub(tmp_path, workers=1)
        next_hub.start()
        try:
            until(lambda: "waiting until they have drained" in next_hub.log())
            (hub.orders / "deaf").unlink()
            next_hub.wait_state("ready")
        finally:
            next_hub.end()


@pytest.mark.parametrize("turns", [4, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(400)])])
def test_start_and_kill_of_the_whole_group_leaves_no_growth(tmp_path: Path, turns: int) -> None:
    """R15: what is ours is cleaned by the next start, what is not ours stays."""
    foreign = tmp_path / "run" / "not-ours.txt"
    for turn in range(turns):
        with FakeHub(tmp_path, workers=2) as hub:
            if turn == 0:
                names = set(os.listdir(hub.runtime_dir))
                foreign.touch()
            assert set(os.listdir(hub.runtime_dir)) == names | {foreign.name}
    assert foreign.exists()


def test_second_supervisor_is_refused_and_the_first_unharmed(tmp_path: Path) -> None:
    """R17: same port, then same directory."""
    (tmp_path / "other").mkdir()
    with FakeHub(tmp_path, workers=1) as hub:
        before = hub.pids()
        same_port = FakeHub(tmp_path / "other", workers=1, port=hub.port)
        same_directory = FakeHub(tmp_path, workers=1)
        same_directory.log_path = tmp_path / "log2"
        for second, words in ((same_port, f"127.0.0.1:{hub.port}"), (same_directory, hub.runtime_dir)):
            second.start()
            try:
                assert second.wait() == 4
            finally:
                second.end()
            assert "in use" in second.log()
            assert words in second.log().splitlines()[-1]
        assert hub.pids() == before
        assert hub.ask_worker() == (0, before[0])


SIGNALS = [signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2]


def random_signals(hub: FakeHub, count: int, seed: int) -> None:
    """Signals to the supervisor and, now and then, to a worker; the target of workers stays in 1 to 8."""
    chance = random.Random(seed)
    target = hub.workers
    for _ in range(count):
        signum = chance.choice(SIGNALS)
        if (signum == signal.SIGTTIN and target >= 8) or (signum == signal.SIGTTOU and target <= 1):
            continue
        scalings = hub.log().count("scale: from")
        hub.signal(signum)
        if signum in (signal.SIGTTIN, signal.SIGTTOU):
            target += 1 if signum == signal.SIGTTIN else -1
            # Two equal signals that are both pending are one to the kernel.
            hub.wait_log("scale: from", scalings + 1)
        if chance.random() < 0.05:
            victims = list(hub.pids().values())
            if victims:
                victim = chance.choice(victims)
                with contextlib.suppress(ProcessLookupError):  # it ends by itself, of the signal before
                    os.kill(victim, chance.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGHUP]))
    status = hub.wait_status(
        lambda s: s["state"] == "ready" and len(s["workers"]) == s["target"] == target,
        40,
        f"{target} workers",
    )
    assert sorted(w["listener"] for w in status["workers"]) == list(range(target))
    assert sorted([hub.pid, *hub.pids().values()]) == sorted(hub.group())
    assert {hub.ask_worker()[0] for _ in range(100 * target)} == set(range(target))


def test_random_signals(tmp_path: Path) -> None:
    """R8, short form: 120 signals, then a defined state, the right number of processes, no zombie."""
    with FakeHub(tmp_path, workers=2) as hub:
        random_signals(hub, 120, seed=8)
        hub.signal(signal.SIGTERM)
        hub.signal(signal.SIGTERM)
        assert hub.wait() == 0
        assert hub.group() == []


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(3))
def test_random_signals_long(tmp_path: Path, seed: int) -> None:
    with FakeHub(tmp_path, workers=2) as hub:
        random_signals(hub, 500, seed)


def test_pid_of_a_reaped_worker_never_gets_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """R18: signals go to unreaped children only, whose pid can not be another process's yet."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: sent.append((pid, signum)))
    ours, theirs = socket.socketpair()
    settings = load_settings({}, {})
    with ours, theirs, selectors.PollSelector() as selector:
        ours.setblocking(False)
        flock = Flock(settings, cast(ListenerGroup, None), cast(RuntimeDir, None), selector)
        process = WorkerProcess(4_000_000, 0, ours, now=0.0)
        process.kill_by(1.0, "is late")
        flock.processes[process.pid] = process
        flock.watch(0.5, Clockwork(0.0, 1.0))
        assert sent == []
        flock.forget(process, 0.6)
        flock.watch(2.0, Clockwork(0.0, 1.0))
        flock.kill_all()
    assert sent == []
