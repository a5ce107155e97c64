"""How the hub logs: one line per event on stderr, for people or as JSON, with time, level and process.

Supervisor and workers call :func:`configure` once each. No message passes here.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

import msgspec

CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
CONTROL_CHARACTERS |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
"""Escaped in every line: a client's text must not end a line or colour a terminal."""

ROUTINE_LINES = frozenset(
    {
        '%s - "WebSocket %s" [accepted]',
        '%s - "WebSocket %s" %d',
        '%s - "WebSocket %s" 403',
        "connection open",
        "connection closed",
        "Waiting for application startup.",
        "Application startup complete.",
        "Waiting for application shutdown.",
        "Application shutdown complete.",
    }
)
"""What uvicorn logs at level info for every connection, which would cost more than serving it, and every worker."""

LOGGERS_OF_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")


class TextFormatter(logging.Formatter):
    """``2026-01-31 12:00:00.000 INFO     worker 3 [4711] what happened``."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback below it if there is one; a block of our own stands as it is."""
        if getattr(record, "block", False):
            return record.getMessage()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        message = record.getMessage().translate(CONTROL_CHARACTERS)
        head = f"{stamp}.{int(record.msecs):03d} {record.levelname:<8} {self._process} [{record.process}]"
        return f"{head} {message}{_traceback(self, record)}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, process, pid, logger, message, and error if any."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage().partition("\n")[0]
            if hasattr(record, "block")
            else record.getMessage(),
        }
        fields.update(getattr(record, "fields", {}))
        traceback = _traceback(self, record)
        if traceback:
            fields["error"] = traceback.lstrip("\n")
        return msgspec.json.encode(fields, enc_hook=str).decode(errors="replace")


class RoutineFilter(logging.Filter):
    """Keeps uvicorn's lines about what happens all the time out of the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record."""
        return record.levelno > logging.INFO or record.msg not in ROUTINE_LINES


def configure(
    level: str, format: str, process: str, *, access_log: bool = False, stream: TextIO | None = None
) -> None:
    """Send all logging of this process to stderr.

    Args:
        level: the least level to log, in lower case.
        format: ``text`` or ``json``.
        process: who logs: ``supervisor``, ``worker 3``.
        access_log: whether to log every request and connection.
        stream: where to, None for stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process) if format == "json" else TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in LOGGERS_OF_UVICORN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    logging.getLogger("uvicorn.access").disabled = not access_log
    errors = logging.getLogger("uvicorn.error")
    errors.filters[:] = [] if access_log else [RoutineFilter()]
    # Both log every connection attempt of theirs at level info or debug.
    for name in ("asyncio", "websockets"):
        logging.getLogger(name).setLevel(max(logging.getLevelName(level.upper()), logging.WARNING))


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback of a record, on lines of its own, or nothing."""
    return "\n" + formatter.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
