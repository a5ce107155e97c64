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


def per_call_us(call: Callable[[int], object]) -> float:
    """The least of several means, in processor time: what the call costs when nothing disturbs it."""
    best = float("inf")
    for _ in range(REPEATS):
        began = time.process_time()
        for i in range(CALLS):
            call(i)
        best = min(best, (time.process_time() - began) / CALLS * 1e6)
    return best


def once(turn: int) -> list[Run]:
    """All sizes once: a topic asked again and again, ever new topics, and ever new ones that patterns match."""
    runs = []
    for unrelated in UNRELATED:
        index = filled(unrelated)
        gc.collect()  # and as in a worker
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        figures = {
            "repeated_us": per_call_us(lambda _, index=index: index.match("room/7/news")),  # type: ignore[misc]
            "exact_us": per_call_us(lambda i, index=index: index.match(f"exact/{i}/news")),  # type: ignore[misc]
            "wildcard_us": per_call_us(lambda i, index=index: index.match(f"room/{i}/news")),  # type: ignore[misc]
        }
        assert len(index.match("room/7/news")) == 4
        gc.unfreeze()
        runs.append(Run(scenario=f"index-{unrelated}", server="flockwire", round=turn, metrics=figures))
    return runs


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
