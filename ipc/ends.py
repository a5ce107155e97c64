"""The names of a peer's ends in the runtime directory: where messages and connections for it come in."""

from __future__ import annotations

import re
from typing import Final

#: Any of these names; its groups are slot and epoch.
END: Final = re.compile(r"[dip](\d{1,3})\.(\d{1,10})")


def inbox_name(slot: int, epoch: int) -> str:
    """An inbox of the mesh (:mod:`ipc.inbound`)."""
    return f"i{slot}.{epoch}"


def shortcut_name(slot: int, epoch: int) -> str:
    """The end of the short way beside it (:mod:`ipc.shortcut`)."""
    return f"d{slot}.{epoch}"


def passing_name(slot: int, epoch: int) -> str:
    """Where connections are taken over (:mod:`ipc.passing`)."""
    return f"p{slot}.{epoch}"


def end_names(slot: int, epoch: int) -> tuple[str, ...]:
    """All of them."""
    return inbox_name(slot, epoch), shortcut_name(slot, epoch), passing_name(slot, epoch)
