"""Presence and history for clients of the Centrifuge protocol: what can be answered at once.

Beside the way of a message, called by ``workers/centrifuge_client.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipc.positions import Position
from ipc.store import Present
from ipc.store_records import StoreError, UnrecoverablePosition
from ipc.topics import is_pattern
from workers import centrifuge_effects as effects
from workers.centrifuge_effects import Effect
from workers.codes import ErrorCode

if TYPE_CHECKING:
    from workers.centrifuge import Session
    from workers.centrifuge_hub import CentrifugeHub


def answer_presence(hub: CentrifugeHub, session: Session, effect: effects.Presence) -> list[Effect]:
    """Who is subscribed to exactly this topic or pattern."""
    present = _present(hub, session, effect.channel)
    if isinstance(present, ErrorCode):
        return session.failed(effect.id, present)
    return session.presence(effect.id, {who.client: who.info for who in present})


def answer_presence_stats(
    hub: CentrifugeHub, session: Session, effect: effects.PresenceStats
) -> list[Effect]:
    """How many are, and how many different users."""
    present = _present(hub, session, effect.channel)
    if isinstance(present, ErrorCode):
        return session.failed(effect.id, present)
    return session.presence_stats(effect.id, len(present), len({who.user for who in present}))


def _present(hub: CentrifugeHub, session: Session, channel: str) -> list[Present] | ErrorCode:
    manager, presence = hub.manager, hub.presence
    if not manager.rules.may_subscribe(channel, bool(session.user)):
        return ErrorCode.PERMISSION_DENIED
    if presence is None or not manager.rules.has_presence(channel):
        return ErrorCode.NOT_AVAILABLE
    try:
        return presence.present(manager.broker_channel, channel)
    except StoreError:
        return ErrorCode.INTERNAL


def answer_history(hub: CentrifugeHub, session: Session, effect: effects.History) -> list[Effect]:
    """A page of a topic's history."""
    manager, log, channel = hub.manager, hub.manager.log, effect.channel
    if not manager.rules.may_subscribe(channel, bool(session.user)):
        return session.failed(effect.id, ErrorCode.PERMISSION_DENIED)
    if log is None or is_pattern(channel) or manager.rules.retention(channel) is None:
        return session.failed(effect.id, ErrorCode.NOT_AVAILABLE)
    since = Position(effect.since.offset, effect.since.epoch) if effect.since is not None else None
    try:
        found = log.history(manager.broker_channel, channel, effect.limit, since, effect.reverse)
    except UnrecoverablePosition:
        return session.failed(effect.id, ErrorCode.UNRECOVERABLE_POSITION)
    except StoreError:
        return session.failed(effect.id, ErrorCode.INTERNAL)
    items = [
        effects.Publication(entry.data, entry.offset, entry.topic, entry.info) for entry in found.entries
    ]
    return session.history(effect.id, channel, items, found.top, found.epoch)
