"""The words at the start: where the hub is, what it serves, and what is on. No message passes here."""

from __future__ import annotations

import logging
import os
from typing import Any

from ipc.rules import Rules
from supervisor.listeners import format_address
from supervisor.status import version
from workers.options import show_size
from workers.settings import Settings

notice = logging.getLogger("supervisor.notice")
"""What the person at the terminal is to see at every log level."""
notice.setLevel(logging.INFO)


def base_url(settings: Settings, port: int) -> str:
    """``http://127.0.0.1:8000``."""
    return f"{'https' if settings.is_tls else 'http'}://{format_address(settings.host, port)}"


def endpoints(settings: Settings, port: int) -> list[str]:
    """The URLs of the built-in hub; an application has its own."""
    base = base_url(settings, port)
    if settings.app is not None:
        return [base]
    sockets = "ws" + base.removeprefix("http")
    return [
        f"{sockets}/ws",
        f"{sockets}/ws/{{conn_id}}",
        f"{sockets}/connection/websocket",
        f"{base}/events",
        f"{base}/healthz",
        f"{base}/readyz",
    ]


def announce(settings: Settings, port: int, runtime_dir: str) -> None:
    """Log the block of the start: one record, so that nothing comes between its lines."""
    fields = describe(settings, port, runtime_dir)
    text = f"flockwire {version()} (pid {os.getpid()})\n{render(fields)}"
    notice.info("%s", text, extra={"fields": {"event": "start", **fields}, "block": True})


def render(fields: dict[str, Any]) -> str:
    """One line per field, and one per item of a list."""
    lines = []
    for name, value in fields.items():
        items = value if isinstance(value, list) else [value]
        titles = [name.replace("_", " "), *[""] * len(items)]
        lines += [f"  {title:<18} {item}" for title, item in zip(titles, items, strict=False)]
    return "\n".join(lines)


def describe(settings: Settings, port: int, runtime_dir: str) -> dict[str, Any]:
    """What is in force, by name, in words."""
    return {
        "address": base_url(settings, port),
        "workers": settings.workers,
        "application": _application(settings),
        "runtime_directory": runtime_dir,
        "auth": f"no token check; anonymous clients: {'yes' if settings.allow_anonymous else 'no'}",
        "origins": ", ".join(settings.allow_origin) or "the same host",
        "topic_rules": _rules(settings.rules),
        "history": _history(settings),
        "bridge": _bridge(settings),
        "endpoints": endpoints(settings, port),
    }


def _history(settings: Settings) -> str:
    rules = settings.rules
    if not rules.any_history:
        return "off"
    size = show_size(settings.store_size) if settings.store_size else "its default size"
    return f"on, {'in ' + rules.data_dir if rules.data_dir else 'as long as the hub lives'}, at most {size}"


def _application(settings: Settings) -> str:
    if settings.app is None:
        return "the built-in hub"
    return (
        settings.app + (" (preloaded)" if settings.preload else "") + (" (reload)" if settings.reload else "")
    )


def _bridge(settings: Settings) -> str:
    if settings.redis_url is None:
        return "off"
    from ipc.redis_link import redacted

    return f"{redacted(settings.redis_url)}, prefix {settings.redis_prefix}, {', '.join(settings.federate)}"


def _rules(rules: Rules) -> str:
    access = {"broadcast": rules.client_broadcast, "direct": rules.client_direct}
    words = [f"{name}: {value}" for name, value in access.items() if value is not None]
    return ", ".join([*rules.topics, *words]) or "none"
