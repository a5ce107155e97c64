"""Pictures for the README and the documents: cost per delivery beside the peers, and growth with workers.

    python -m bench.plot RESULTS.json --peers docs/performance.png --growth docs/growth.png

Needs matplotlib, which is in the optional dependency ``bench``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.results import Results, load
from bench.servers import OURS, SERVERS
from bench.stats import figure

INK, OURS_COLOUR, PEER_COLOUR, LIMIT_COLOUR = "#333333", "#d1495b", "#9fb3c8", "#486581"
PANELS: tuple[tuple[str, str], ...] = (
    ("A", "one topic, 1,000 subscribers,\n16 messages under way"),
    ("A1", "the same,\none message under way"),
    ("C", "500 rooms of two"),
)


class NoMatplotlib(RuntimeError):
    """matplotlib is not installed; the optional dependency ``bench`` has it."""


def pyplot() -> Any:
    """matplotlib without a display.

    Raises:
        NoMatplotlib: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlib("matplotlib is not installed: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    found.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "ytick.color": INK})
    return found


def colour(name: str) -> str:
    """Ours stands out; the limit in C is darker than the peers."""
    return OURS_COLOUR if name in OURS else LIMIT_COLOUR if name.startswith("c-") else PEER_COLOUR


def bare(axes: Any) -> None:
    """No frame, no ticks: the figures stand at the dots."""
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def plot_peers(results: Results, path: Path) -> None:
    """Microseconds of server CPU per delivery, one panel a scenario, the cheapest on top."""
    plt = pyplot()
    shown = [(name, title) for name, title in PANELS if results.spread(name, "flockwire", "cpu_us")]
    if not shown:
        raise SystemExit("these results hold no figure of ours for A, A1 or C")
    drawing, all_axes = plt.subplots(1, len(shown), figsize=(3.7 * len(shown), 3.3), squeeze=False)
    for axes, (scenario, title) in zip(all_axes[0], shown, strict=True):
        found = {
            name: one.median
            for name in SERVERS
            if (one := results.spread(scenario, name, "cpu_us")) is not None
        }
        names = sorted(found, key=found.__getitem__, reverse=True)
        low = min(found.values()) / 3
        for row, name in enumerate(names):
            axes.hlines(row, low, found[name], color="#e4e7eb", linewidth=1, zorder=1)
            axes.scatter(found[name], row, color=colour(name), s=36, zorder=2)
            text = {"textcoords": "offset points", "xytext": (7, 0), "va": "center", "color": INK}
            axes.annotate(figure(found[name]), (found[name], row), **text)
        axes.set_yticks(range(len(names)), [SERVERS[name].title for name in names])
        axes.set_xscale("log")
        axes.set_xlim(low, max(found.values()) * 3)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks([])
        axes.minorticks_off()
        bare(axes)
    drawing.suptitle(
        "server CPU per delivered message, µs (logarithmic; less is better)", x=0.01, ha="left", fontsize=11
    )
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def short(value: float) -> str:
    """``1.52 M``, ``84.1 k``."""
    return f"{figure(value / 1e6)} M" if value >= 1e6 else f"{figure(value / 1e3)} k"


def plot_growth(results: Results, path: Path) -> None:
    """Deliveries per CPU-second with one, two and four workers."""
    plt = pyplot()
    drawing, axes = plt.subplots(figsize=(5.5, 3.1))
    series = {
        "workers": "fan-out, 16 under way",
        "workers one outstanding": "fan-out, one under way",
        "workers rooms": "500 rooms of two",
    }
    workers = {1: "flockwire", 2: "flockwire-2", 4: "flockwire-4"}
    for (name, title), shade in zip(series.items(), (OURS_COLOUR, LIMIT_COLOUR, PEER_COLOUR), strict=True):
        found = [
            (count, one.median)
            for count, server in workers.items()
            if (one := results.spread(f"{name}-{count}", server, "deliveries_per_cpu_s")) is not None
        ]
        if len(found) > 1:
            axes.plot(*zip(*found, strict=True), marker="o", color=shade, label=title)
            for count, value in found:
                axes.annotate(
                    figure(value), (count, value), textcoords="offset points", xytext=(4, 5), fontsize=8
                )
    axes.set_yscale("log")
    axes.set_xticks(list(workers), [str(count) for count in workers])
    axes.set_xlabel("workers")
    axes.set_title("deliveries per second of CPU", loc="left", fontsize=11)
    if not axes.get_lines():
        raise SystemExit("these results hold no growth with workers: python -m bench --scenario growth")
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def main() -> None:
    """Draw what is asked for from a file of results."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--peers", type=Path, help="write the picture beside the peers here")
    parser.add_argument("--growth", type=Path, help="write the picture of growth with workers here")
    options = parser.parse_args()
    results = load(options.results)
    if options.peers:
        plot_peers(results, options.peers)
    if options.growth:
        plot_growth(results, options.growth)


if __name__ == "__main__":
    main()
