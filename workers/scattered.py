"""Delivery to connections that do not live on the loop of this thread.

Beside the usual way, :meth:`workers.WebSocketManager._deliver`: an endpoint without ``async`` publishes from a thread
of its own, and test clients have a loop for each connection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from threading import get_ident

from ipc.envelope import TOPIC, Envelope
from workers.fanout import Fanout, SlowPolicy
from workers.sinks import AnySink


def deliver_elsewhere(
    envelopes: Sequence[Envelope],
    targets_of: Callable[[Envelope], Sequence[AnySink]],
    policy_of: Callable[[str], SlowPolicy],
) -> None:
    """Give each loop what its connections are to get; a loop that is closed is left out, with all its connections."""
    for envelope in envelopes:
        by_loop: dict[Fanout, list[AnySink]] = {}
        for sink in targets_of(envelope):
            by_loop.setdefault(sink.fanout, []).append(sink)
        policy = policy_of(envelope.topic) if envelope.kind == TOPIC else "close"
        for fanout, sinks in by_loop.items():
            if fanout.loop.is_closed():
                continue  # its thread's number may be another one's by now
            send = functools.partial(fanout.send, tuple(sinks), envelope.data, policy, envelope.topic)
            if fanout.thread == get_ident():
                send()
            else:
                fanout.loop.call_soon_threadsafe(send)
