"""How many descriptors a process of the hub may use up, and how many are kept for the bus.

At the limit (``ulimit -n``) ZeroMQ ends the process when another one joins. So clients (``workers/accepting.py``) and
short ways (``shortcut.py``), which can do without, never get the last ones.
"""

from __future__ import annotations

import resource
import sys
from typing import Final

RESERVED: Final = 64
"""Descriptors kept for ZeroMQ (two for each process that joins), files and the application."""


def ceiling() -> int:
    """What can do without gets descriptors below this number: the soft limit less `RESERVED`, or a quarter of it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft - min(RESERVED, soft // 4)
