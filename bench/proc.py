"""Read /proc: the processor time and memory of a process tree, and which process holds a connection."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


def stat_fields(pid: int) -> list[str] | None:
    """The fields of ``/proc/<pid>/stat`` after the name (which may hold anything); None when it is gone."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()


def cpu_us(pid: int) -> int:
    """User plus system time of a process in microseconds, 0 when it is gone."""
    fields = stat_fields(pid)
    return 0 if fields is None else (int(fields[11]) + int(fields[12])) * TICK_US


def tree(roots: Iterable[int]) -> list[int]:
    """The living among ``roots`` and all their descendants."""
    children: dict[int, list[int]] = {}
    living = set()
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := stat_fields(int(entry.name))) is not None:
            living.add(int(entry.name))
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid for pid in roots if pid in living]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting.extend(children.get(pid, ()))
    return sorted(set(found))


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of several processes: shared pages are counted once, divided among them."""
    total = 0
    for pid in pids:
        try:
            rollup = (PROC / str(pid) / "smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def server_inodes(server_port: int) -> dict[int, int]:
    """Client port to the inode of the server's end, for established IPv4 connections to ``server_port``."""
    found = {}
    for line in (PROC / "net" / "tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote, state, inode = fields[1], fields[2], fields[3], int(fields[9])
        if state == "01" and int(local.split(":")[1], 16) == server_port:
            found[int(remote.split(":")[1], 16)] = inode
    return found


def socket_owners(pids: Iterable[int]) -> dict[int, int]:
    """Socket inode to the process that has it open."""
    owners = {}
    for pid in pids:
        try:
            links = list((PROC / str(pid) / "fd").iterdir())
        except (FileNotFoundError, PermissionError):
            continue
        for link in links:
            try:
                target = os.readlink(link)
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                owners[int(target[8:-1])] = pid
    return owners


def place(server_port: int, client_ports: Iterable[int], pids: Iterable[int]) -> list[int | None]:
    """For each client port the process at the other end: nothing need be asked of the server."""
    inodes, owners = server_inodes(server_port), socket_owners(pids)
    return [owners.get(inodes.get(port, -1)) for port in client_ports]
