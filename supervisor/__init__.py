"""The supervisor: one thread that owns the sockets and the lives of the workers. No message passes here."""

from __future__ import annotations

__flockwire__ = True
"""What tells our package from another one of the same name (see :mod:`supervisor.__main__`)."""
