"""The rules of a hub, on which all its processes agree through one file.

Stands under ``runtime.py``: whoever joins brings its topic rules, or takes those that are there. The caller holds the
directory lock, so nobody reads what is half written and two that start at once cannot both be the first.
"""

from __future__ import annotations

import os

from ipc.directory import RuntimeDirError
from ipc.rules import Rules

RULES_NAME = "rules.json"


class RulesMismatch(RuntimeDirError):
    """This process was given other topic rules than the hub that is running."""


def agree(dir_fd: int, path: str, rules: Rules | None) -> Rules:
    """The rules of the hub: the first process that has some writes them, a later one must bring the same or None.

    Args:
        dir_fd: the runtime directory.
        path: its name, for the words of an error.
        rules: what this process was given; None takes what is there.

    Raises:
        RulesMismatch: the hub has others; names both values.
        RuntimeDirError: the file cannot be read.
    """
    there = _read(dir_fd, path)
    if there is None:
        if rules is not None:
            _write(dir_fd, rules)
        return rules or Rules()
    difference = rules.difference(there) if rules is not None else None
    if difference is not None:
        raise RulesMismatch(f"{path}: {difference}; give all processes of a hub the same rules")
    return there


def _read(dir_fd: int, path: str) -> Rules | None:
    try:
        fd = os.open(RULES_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        text = file.read()
    try:
        return Rules.decode(text)
    except ValueError as error:
        raise RuntimeDirError(f"{path}/{RULES_NAME} cannot be read: {error}") from error


def _write(dir_fd: int, rules: Rules) -> None:
    temporary = f"{RULES_NAME}.new"
    try:
        os.unlink(temporary, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(temporary, flags, 0o600, dir_fd=dir_fd), "wb") as file:
        file.write(rules.encode())
    os.rename(temporary, RULES_NAME, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
