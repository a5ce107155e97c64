"""What the index of subscriptions costs: flat however many others there are, with and without wildcards."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from bench.results import Results, Run
from bench.stats import figure, table
from workers.subscriptions import SubscriptionIndex

UNRELATED = (10, 1_000, 100_000)
REPEATS = 80
CALLS = 5_000
"""More than the index keeps answers for, so that each topic is new to it."""


def filled(unrelated: int) -> SubscriptionIndex[int]:
    """An index with so many unrelated subscriptions (a tenth of them patterns), and four that will match."""
    index: SubscriptionIndex[int] = SubscriptionIndex()
    for i in range(unrelated):
        index.add(f"other/{i % 97}/{i}" if i % 10 else f"other/+/{i}/#", i)
    for number, pattern in enumerate(("room/#", "room/+/news", "+/+/news", "room/7/+")):
        index.add(pattern, -1 - number)
    for i in range(CALLS):
        index.add(f"exact/{i}/news", -10)
    return index


CASES: dict[str, Callable[[SubscriptionIndex[int], int], object]] = {
    "repeated_us": lambda index, i: index.match("room/7/news"),
    "exact_us": lambda index, i: index.match(f"exact/{i}/news"),
    "wildcard_us": lambda index, i: index.match(f"room/{i}/news"),
}
"""A topic asked again and again, ever new topics, and ever new ones that patterns match."""


def per_call_us(
    index: SubscriptionIndex[int], call: Callable[[SubscriptionIndex[int], int], object]
) -> float:
    """What a call costs on the average, in processor time."""
    began = time.process_time()
    for i in range(CALLS):
        call(index, i)
    return (time.process_time() - began) / CALLS * 1e6


def once(turn: int) -> list[Run]:
    """All sizes in turn, many times, and of each the least: what it costs when nothing disturbs it."""
    indexes = {unrelated: filled(unrelated) for unrelated in UNRELATED}
    best = {unrelated: dict.fromkeys(CASES, float("inf")) for unrelated in UNRELATED}
    gc.collect()  # and as in a worker
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    for _ in range(REPEATS):
        for name, call in CASES.items():
            for unrelated, index in indexes.items():
                best[unrelated][name] = min(best[unrelated][name], per_call_us(index, call))
    gc.unfreeze()
    assert all(len(index.match("room/7/news")) == 4 for index in indexes.values())
    return [
        Run(scenario=f"index-{unrelated}", server="flockwire", round=turn, metrics=figures)
        for unrelated, figures in best.items()
    ]


def report(results: Results) -> str:
    """The table of the index."""
    columns = {
        "repeated_us": "same topic, µs",
        "exact_us": "new topic each time, µs",
        "wildcard_us": "new topic, three patterns match, µs",
    }
    lines = []
    for unrelated in UNRELATED:
        found = [results.spread(f"index-{unrelated}", "flockwire", metric) for metric in columns]
        if found[0]:
            lines.append([f"{unrelated:,}", *(figure(one.median if one else None) for one in found)])
    return table(["unrelated subscriptions", *columns.values()], lines) if lines else ""
