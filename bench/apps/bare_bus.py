"""The floor of crossing workers: a bare PUB and SUB over ipc:// between two uvloop processes, and nothing else.

No numbering, no credit, no back-pressure, no envelope: what ZeroMQ and the kernel take alone.

    python -m bench.apps.bare_bus receive ENDPOINT
    python -m bench.apps.bare_bus send ENDPOINT MESSAGES RATE SIZE TURN

The receiver says ``{"bound": true}``, and at the end its processor time and latencies; the sender says its own.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import time
from collections.abc import Callable

import uvloop
import zmq

_STAMP = struct.Struct("q")
_END = b"end"
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_DONTWAIT = int(zmq.DONTWAIT)


def cpu_us() -> float:
    """User plus system time of this process, all threads, in microseconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) * 1e6


def receive(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> dict[str, float]:
    """Take messages until the last one; each holds the time it was sent at."""
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.bind(endpoint)
    latencies: list[int] = []
    began = 0.0
    loop = uvloop.new_event_loop()

    def on_readable() -> None:
        nonlocal began
        if not socket.get(_EVENTS) & _POLLIN:  # type: ignore[operator]
            return
        while True:
            try:
                message = socket.recv(_DONTWAIT)
            except zmq.Again:
                return
            if message == _END:
                loop.stop()
                return
            if not latencies:
                began = cpu_us()
            latencies.append(time.monotonic_ns() - _STAMP.unpack_from(message)[0])

    loop.add_reader(int(socket.get(zmq.FD)), on_readable)
    loop.call_soon(on_readable)
    print(json.dumps({"bound": True}), flush=True)
    loop.run_forever()
    used = cpu_us() - began
    latencies.sort()
    half, most = (latencies[int(len(latencies) * part)] / 1000 for part in (0.5, 0.99))
    return {"messages": len(latencies), "cpu_us": used / len(latencies), "p50_us": half, "p99_us": most}


def send(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, messages: int, rate: float, size: int, turn: int
) -> dict[str, float]:
    """Send so many messages of ``size`` bytes at ``rate`` a second, ``turn`` of them in each turn of the loop."""
    socket = context.socket(zmq.XPUB)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(endpoint)
    socket.recv()  # the subscription: what is sent from now on arrives
    loop = uvloop.new_event_loop()
    padding = bytes(size - _STAMP.size)
    began = cpu_us()
    first, sent = loop.time(), 0
    finish: Callable[[], None] = loop.stop

    def one_turn() -> None:
        nonlocal sent
        for _ in range(turn):
            socket.send(_STAMP.pack(time.monotonic_ns()) + padding, _DONTWAIT)
        sent += turn
        if sent >= messages:
            loop.call_later(0.01, finish)
        else:
            loop.call_at(first + sent / rate, one_turn)

    loop.call_soon(one_turn)
    loop.run_forever()
    used = cpu_us() - began
    socket.send(_END)
    socket.close(5000)
    return {"messages": sent, "cpu_us": used / sent}


def main() -> None:
    """One side, as the arguments say."""
    role, endpoint, *numbers = sys.argv[1:]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    if role == "receive":
        found = receive(context, endpoint)
    else:
        messages, rate, size, turn = map(int, numbers)
        found = send(context, endpoint, messages, rate, size, turn)
    print(json.dumps(found), flush=True)
    context.destroy(5000)


if __name__ == "__main__":
    main()
