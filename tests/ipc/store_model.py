"""A naive model of the store: every entry ever appended, in lists; what is recoverable follows from the definition."""

from __future__ import annotations

from dataclasses import dataclass, field

from ipc.topics import matches

METADATA_SECONDS = 7 * 86_400


@dataclass
class ModelEntry:
    offset: int
    previous: int
    time: float
    topic: tuple[str, str]
    data: bytes


@dataclass
class ModelTopic:
    size: int
    ttl: float
    kept: list[ModelEntry] = field(default_factory=list)
    trimmed: int = 0
    top: int = 0
    emptied: float | None = None

    def expired(self, now: float) -> list[ModelEntry]:
        return [entry for entry in self.kept if self.ttl and entry.time + self.ttl <= now]

    def fresh(self, now: float) -> list[ModelEntry]:
        return [entry for entry in self.kept if not self.ttl or entry.time + self.ttl > now]

    def trimmed_now(self, now: float) -> int:
        """``trimmed``, with what is too old counted as removed."""
        return max([self.trimmed, *(entry.offset for entry in self.expired(now))])

    def drop(self, entries: list[ModelEntry], now: float) -> None:
        for entry in entries:
            self.kept.remove(entry)
            self.trimmed = max(self.trimmed, entry.offset)
        if entries and not self.kept:
            self.emptied = now


class Model:
    def __init__(self) -> None:
        self.topics: dict[tuple[str, str], ModelTopic] = {}
        self.ever: list[ModelEntry] = []
        self.floor = 0

    @property
    def top(self) -> int:
        return len(self.ever)

    def append(self, channel: str, topic: str, data: bytes, size: int, ttl: float, now: float) -> ModelEntry:
        found = self.topics.setdefault((channel, topic), ModelTopic(size, ttl))
        found.drop(found.expired(now), now)
        found.size, found.ttl = size, ttl
        found.drop(found.expired(now), now)
        while len(found.kept) >= size:
            found.drop(found.kept[:1], now)
        entry = ModelEntry(self.top + 1, found.top, now, (channel, topic), data)
        found.kept.append(entry)
        found.top = entry.offset
        found.emptied = None
        self.ever.append(entry)
        return entry

    def clear(self, channel: str, topic: str, now: float) -> None:
        found = self.topics.get((channel, topic))
        if found is not None:
            found.drop(list(found.kept), now)

    def maintain(self, now: float) -> None:
        for topic in self.topics.values():
            topic.drop(topic.expired(now), now)
        empty = sorted((topic.trimmed, name) for name, topic in self.topics.items() if not topic.kept)
        for trimmed, name in empty:
            emptied = self.topics[name].emptied
            assert emptied is not None
            if emptied + METADATA_SECONDS > now:
                break
            del self.topics[name]
            self.floor = max(self.floor, trimmed)

    def evict(self, now: float) -> bool:
        """The oldest thing goes: an entry, or the memory of an empty topic."""
        things = [
            (topic.kept[0].offset if topic.kept else topic.trimmed, name)
            for name, topic in self.topics.items()
        ]
        if not things:
            return False
        offset, name = min(things)
        topic = self.topics[name]
        if topic.kept:
            topic.drop(topic.kept[:1], now)
        else:
            del self.topics[name]
            self.floor = max(self.floor, offset)
        return True

    def recover(
        self, channel: str, patterns: list[str], offset: int, now: float
    ) -> tuple[bool, list[ModelEntry]]:
        wanted = [
            topic for name, topic in self.topics.items() if name[0] == channel and matches(name[1], patterns)
        ]
        recovered = self.floor <= offset <= self.top and all(
            topic.trimmed_now(now) <= offset for topic in wanted
        )
        if not recovered:
            return False, []
        found = [entry for topic in wanted for entry in topic.fresh(now) if entry.offset > offset]
        return True, sorted(found, key=lambda entry: entry.offset)

    def ever_after(self, channel: str, patterns: list[str], offset: int, top: int) -> list[ModelEntry]:
        """Everything that was published on the topics that match, kept or not."""
        return [
            entry
            for entry in self.ever[offset:top]
            if entry.topic[0] == channel and matches(entry.topic[1], patterns)
        ]
