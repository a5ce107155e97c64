"""``tail``: a peer on the bus that prints what is published.

The end of the way of a message for a person at a terminal: from the bus to a line on stdout.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import msgspec

from ipc.board import PeerKind
from ipc.envelope import TOPIC, Envelope
from ipc.interest import InterestKind
from ipc.peer import Peer
from ipc.topics import check_pattern, is_pattern, matches, prefix_run

LOOK_FOR_END = 0.25
"""Seconds between two looks whether the hub still runs."""


def check(pattern: str) -> None:
    """Check what is to be followed.

    Raises:
        InvalidTopic: it is no pattern.
    """
    check_pattern(pattern)


def follow(runtime_dir: str, channel: str, pattern: str) -> bool:
    """Print messages until interrupted (True) or until the hub has ended (False).

    Raises:
        RuntimeDirError: the hub can not be joined.
    """
    return asyncio.run(_follow(runtime_dir, channel, pattern))


async def _follow(runtime_dir: str, channel: str, pattern: str) -> bool:
    loop = asyncio.get_running_loop()
    interrupted = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, interrupted.set)

    def deliver(envelopes: list[Envelope]) -> None:
        try:
            write(envelopes, pattern)
        except BrokenPipeError:  # `tail ... | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            interrupted.set()

    peer = await Peer.open(runtime_dir, kind=PeerKind.TAIL)
    try:
        peer.attach(channel, deliver)
        if is_pattern(pattern):
            peer.interest_add(InterestKind.PREFIX, channel, prefix_run(pattern))
        else:
            peer.interest_add(InterestKind.EXACT, channel, pattern)
        while not interrupted.is_set():
            peer.record.beat()
            if peer.runtime.has_ended():
                return False
            try:
                await asyncio.wait_for(interrupted.wait(), LOOK_FOR_END)
            except TimeoutError:
                pass
    finally:
        await peer.close()
    return True


def write(envelopes: list[Envelope], pattern: str) -> None:
    """One line for each envelope that matches."""
    lines = [
        line(envelope)
        for envelope in envelopes
        if envelope.kind == TOPIC and matches(envelope.topic, pattern)
    ]
    if lines:
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.buffer.flush()


def line(envelope: Envelope) -> bytes:
    """``{"topic":"a/b","data":{...}}`` and a newline; the data as they came, without white space."""
    data = msgspec.json.format(envelope.data, indent=-1)
    return b'{"topic":%b,"data":%b}\n' % (msgspec.json.encode(envelope.topic), data)
