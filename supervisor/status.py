"""What a running hub is doing: from the board and from the supervisor's own table. No message passes here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ipc.board import GAUGES, SLOTS, Counter, PeerKind, Record, SlotState
from supervisor.worker_process import Phase, WorkerProcess
from workers.settings import Settings

if TYPE_CHECKING:
    from supervisor.arbiter import Arbiter

SHOWN_SETTINGS = (
    "app", "preload", "reload", "allow_origin", "allow_anonymous", "max_message_size", "max_subscriptions",
    "max_backlog", "bus_backlog", "drain_timeout", "worker_timeout", "boot_timeout", "data_dir", "store_size",
)  # fmt: skip


def describe(arbiter: Arbiter, now: float) -> dict[str, Any]:
    """The answer to ``status``, with stable keys; times in seconds, sizes in bytes."""
    flock = arbiter.flock
    return {
        "ok": True,
        "state": arbiter.state,
        "address": arbiter.address,
        "pid": os.getpid(),
        "uptime": round(now - arbiter.started, 3),
        "runtime_dir": flock.runtime.path,
        "version": version(),
        "settings": _settings(flock.settings),
        "target": len(flock.wanted_seats()),
        "workers": list(_workers(arbiter, now)),
        "bridge": None if arbiter.bridge is None else arbiter.bridge.describe(now),
        "peers": list(_peers(arbiter)),
        "totals": _totals(arbiter),
    }


def version() -> str:
    """The installed version of the distribution."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("flockwire")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"


def _settings(settings: Settings) -> dict[str, Any]:
    shown = {name: getattr(settings, name) for name in SHOWN_SETTINGS}
    return {
        **shown,
        "tls": settings.is_tls,
        "history": settings.rules.any_history,
        "bridge": settings.redis_url is not None,
    }


def _workers(arbiter: Arbiter, now: float) -> Iterable[dict[str, Any]]:
    """One entry per process, and one per seat that has none just now; by listener, then by age."""
    flock = arbiter.flock
    bridge = arbiter.bridge
    workers = [p for p in flock.processes.values() if bridge is None or not bridge.owns(p)]
    for index in sorted({*flock.seats, *(process.index for process in workers)}):
        seat = flock.seats.get(index)
        processes = [process for process in workers if process.index == index]
        common = {"restarts": seat.restarts if seat else 0, "backoff": 0.0}
        for process in sorted(processes, key=lambda process: process.started):
            yield {**_process(arbiter, process, now), **common}
        if seat is not None and seat.worker is None and seat.successor is None and not seat.retiring:
            wait = 0.0 if seat.spawn_at is None else max(0.0, seat.spawn_at - now)
            yield {**_absent(index), **common, "backoff": round(wait, 3)}


def _process(arbiter: Arbiter, process: WorkerProcess, now: float) -> dict[str, Any]:
    record = None if process.slot is None else arbiter.flock.runtime.board.record(process.slot)
    if record is not None and record.epoch != process.epoch:
        record = None
    state = "stale" if process.stale and process.phase is Phase.READY else process.phase.name.lower()
    return {
        "listener": process.index,
        "pid": process.pid,
        "slot": process.slot,
        "epoch": process.epoch,
        "state": state,
        "uptime": round(now - process.started, 3),
        "heartbeat_age": None if record is None else round(max(0.0, now - record.heartbeat / 1e9), 3),
        **_counters(record),
    }


def _absent(index: int) -> dict[str, Any]:
    return {
        "listener": index,
        "pid": None,
        "slot": None,
        "epoch": 0,
        "state": "backoff",
        "uptime": 0.0,
        "heartbeat_age": None,
        **_counters(None),
    }


def _peers(arbiter: Arbiter) -> Iterable[dict[str, Any]]:
    """Processes on the bus that are no workers of ours: applications, publishers, ``tail``."""
    runtime = arbiter.flock.runtime
    for slot in runtime.living():
        identity = runtime.board.record(slot).identity()
        if identity.kind not in (PeerKind.WORKER, PeerKind.NONE):
            yield {
                "kind": identity.kind.name.lower(),
                "slot": slot,
                "epoch": identity.epoch,
                "pid": identity.pid,
                "state": runtime.board.record(slot).state.name.lower(),
            }


def _totals(arbiter: Arbiter) -> dict[str, int]:
    """Sums over all slots: the counters of those that have died are in them."""
    board = arbiter.flock.runtime.board
    totals = dict.fromkeys(_names(), 0)
    for slot in range(SLOTS):
        record = board.record(slot)
        free = record.state is SlotState.FREE
        for counter in Counter:
            if not (free and counter in GAUGES):
                totals[counter.name.lower()] += record.get(counter)
    return totals


def _counters(record: Record | None) -> dict[str, int]:
    return {counter.name.lower(): 0 if record is None else record.get(counter) for counter in Counter}


def _names() -> list[str]:
    return [counter.name.lower() for counter in Counter]


COLUMNS = (
    ("worker", "listener"), ("pid", "pid"), ("slot", "slot"), ("state", "state"), ("heartbeat", "heartbeat_age"),
    ("connections", "connections"), ("subscriptions", "subscriptions"), ("in", "messages_in"),
    ("out", "messages_out"), ("slow", "slow_closed"), ("gaps", "bus_gaps"), ("restarts", "restarts"),
)  # fmt: skip


def render(answer: dict[str, Any]) -> str:
    """The answer to ``status`` as a small table for people."""
    lines = [
        f"{answer['state']}: {answer['address']}, pid {answer['pid']}, up {answer['uptime']:.0f} s",
        f"runtime directory {answer['runtime_dir']}, version {answer['version']}",
        "",
    ]
    rows = [[title for title, _ in COLUMNS]]
    rows += [[_cell(worker[key]) for _, key in COLUMNS] for worker in answer["workers"]]
    totals = {**answer["totals"], "listener": "all", "restarts": sum(w["restarts"] for w in _seats(answer))}
    rows.append([_cell(totals.get(key, "")) for _, key in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if answer["bridge"] is not None:
        lines.append(_bridge_line(answer["bridge"], answer["totals"]))
    lines += [
        f"{peer['kind']}: pid {peer['pid']}, slot {peer['slot']}, {peer['state']}" for peer in answer["peers"]
    ]
    return "\n".join(lines)


def _bridge_line(bridge: dict[str, Any], totals: dict[str, int]) -> str:
    figures = ("out", "in", "dropped", "gaps", "duplicates")
    words = ", ".join(f"{totals[f'federation_{name}']} {name}" for name in figures)
    return f"federation: bridge {bridge['state']}, link {bridge['link']}; {words}"


def _seats(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """One worker per listener index: restarts are counted per index."""
    return list({worker["listener"]: worker for worker in answer["workers"]}.values())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
