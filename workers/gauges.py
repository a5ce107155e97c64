"""What this process counts, put on the board for ``status`` and whoever watches.

The fan-out counts in plain attributes, which cost nothing; twice a second they are copied to the shared memory.
"""

from __future__ import annotations

import asyncio
from typing import Final

from ipc.board import Counter
from ipc.peer import Peer
from workers.fanout import Fanout, current_fanout

#: Seconds between two copies.
INTERVAL: Final = 0.5


class Gauges:
    """Copies this loop's figures to the record of ``peer`` until stopped."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._fanout: Fanout = current_fanout()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._copy()

    def stop(self) -> None:
        """The end; call it before the peer is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _copy(self) -> None:
        fanout, record = self._fanout, self._peer.record
        for counter, value in (
            (Counter.CONNECTIONS, fanout.connections),
            (Counter.SUBSCRIPTIONS, fanout.subscriptions),
            (Counter.MESSAGES_IN, fanout.messages_in),
            (Counter.BYTES_IN, fanout.bytes_in),
            (Counter.MESSAGES_OUT, fanout.messages),
            (Counter.BYTES_OUT, fanout.bytes),
            (Counter.DELIVERIES, fanout.deliveries),
            (Counter.SLOW_CLOSED, fanout.slow_closed),
            (Counter.SLOW_DROPPED, fanout.slow_dropped),
        ):
            record.set(counter, value)
        self._timer = self._loop.call_later(INTERVAL, self._copy)
