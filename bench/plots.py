"""Draw what was measured, as SVG files for the documentation.

The same reports give the same bytes: no date, and fixed identifiers. Colours are those of Okabe and
Ito (2008), which people with any kind of colour blindness can tell apart; markers differ, too. Text
stays text, dark on white.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.parts import ANY_FLOW
from bench.report import Row, Value
from bench.tables import number

INK = "#222222"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LONG_NAME = 20  # characters
WIDTH = 8.0  # inches, 100 pixels each
SETTINGS = {
    "svg.hashsalt": "ipsecgate",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.dpi": 100,
}

TIMES = dict(
    zip(
        (0.1, 1, 10, 100, 1000, 10_000, 100_000),
        ("0.1 ms", "1 ms", "10 ms", "0.1 s", "1 s", "10 s", "100 s"),
        strict=True,
    )
)
"""Names of durations in milliseconds."""

Series = Mapping[str, Sequence[tuple[Any, Row]]]
"""Rows at their places on the first axis, by the name of the line."""


def select(rows: Sequence[Row], name: str, **of: Value) -> list[Row]:
    """Return the rows with a name and these properties."""
    return [r for r in rows if r.name == name and all(r.of.get(k) == v for k, v in of.items())]


def series(rows: Sequence[Row], by: str, at: str) -> dict[str, list[tuple[Any, Row]]]:
    """Return rows as lines: one for each value of `by`, along `at`."""
    lines: dict[str, list[tuple[Any, Row]]] = {}
    for row in rows:
        lines.setdefault(str(row.of[by]), []).append((row.of[at], row))
    return lines


def axes(height: float) -> tuple[Figure, Any]:
    """Return an empty plot; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def spread(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Return how far the quartiles are below and above the medians."""
    return (
        [row.median - row.quartiles[0] for row in rows],
        [row.quartiles[1] - row.median for row in rows],
    )


def draw_lines(plot: Any, lines: Series) -> None:
    """Draw medians as lines, and quartiles as bars at each point."""
    for at, (name, points) in enumerate(lines.items()):
        rows = [row for _, row in points]
        plot.errorbar(
            [place for place, _ in points],
            [row.median for row in rows],
            yerr=spread(rows),
            color=COLOURS[at % len(COLOURS)],
            marker=MARKERS[at % len(MARKERS)],
            capsize=3,
            label=name,
        )
    legend(plot)


def legend(plot: Any) -> None:
    """Put the names of the lines below the plot, in two or three columns."""
    names = plot.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, names), default=0) > LONG_NAME else 3
    plot.figure.legend(loc="outside lower center", ncols=columns)


def draw_dots(plot: Any, lines: Series, text: Callable[[Row], str] = lambda _: "") -> None:
    """Draw medians as dots, one line for each place; quartiles as bars, and texts beside dots."""
    places = list(dict.fromkeys(place for points in lines.values() for place, _ in points))
    step = 0.6 / max(1, len(lines))
    for at, (name, points) in enumerate(lines.items()):
        rows = [row for _, row in points]
        middle, heights = [row.median for row in rows], []
        for place, row in points:
            heights.append(-places.index(place) - (at - (len(lines) - 1) / 2) * step)
            beside = (row.quartiles[1], heights[-1])
            plot.annotate(
                text(row), beside, (8, 0), textcoords="offset points", va="center", fontsize=10
            )
        plot.errorbar(
            middle,
            heights,
            xerr=spread(rows),
            color=COLOURS[at % len(COLOURS)],
            marker=MARKERS[at % len(MARKERS)],
            capsize=3,
            linestyle="none",
            label=name,
        )
    plot.set_yticks([-n for n in range(len(places))], [str(place) for place in places])
    plot.grid(axis="y", visible=False)
    legend(plot)


# --- the plots ------------------------------------------------------------------------------


def whole(axis: Any) -> None:
    """Write the numbers of a logarithmic axis out, instead of powers of ten."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def time_ticks(plot: Any, low: float, high: float) -> None:
    """Make the first axis one of time on a logarithmic scale; limits and data in milliseconds."""
    plot.set(xscale="log", xlim=(low, high))
    ticks = [tick for tick in TIMES if low <= tick <= high]
    plot.set_xticks(ticks, [TIMES[tick] for tick in ticks], minor=False)
    plot.set_xticks([], minor=True)


def first_connection(rows: Sequence[Row]) -> Figure:
    """Time to connect, by delay and way."""
    figure, plot = axes(7.0)
    connected = select(rows, "connected")
    lines = series(connected, "way", "one way")
    draw_dots(plot, lines, lambda row: f"{number(row.median)} ms")
    time_ticks(plot, 5, 20_000)
    plot.set(xlabel="connected after", ylabel="delay of the path, one way")
    return figure


def failure(rows: Sequence[Row]) -> Figure:
    """Time until an error, with its name; one dot for each failure and way."""
    figure, plot = axes(6.0)
    told = select(rows, "told after")
    draw_dots(plot, series(told, "failure", "way"), lambda row: str(row.of["error"]))
    time_ticks(plot, 0.05, 5_000_000)
    plot.set(xlabel="the application gets an error after")
    return figure


def hot_path(rows: Sequence[Row]) -> Figure:
    """Ratio of a gated call to the same call without hooks, now and before."""
    figure, plot = axes(6.0)
    usual = {"selectors": 16384, "masks": 32}
    lines = {
        title: [(row.of["call"], row) for row in select(rows, name, **usual)]
        for title, name in (("now", "ratio"), ("before", "ratio, before"))
    }
    draw_dots(plot, lines)
    plot.axvline(1, color=INK, linewidth=1)
    plot.set(xscale="log", xlabel="time of a gated call / time without hooks")
    ticks = [1, 1.5, 2, 3, 5, 8]
    plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    plot.set_xticks([], minor=True)
    return figure


def hot_path_growth(rows: Sequence[Row]) -> Figure:
    """The same ratio by the number of selectors, for some calls."""
    figure, plot = axes(5.0)
    calls = (ANY_FLOW, "sendto, 8 peers", "sendto, 500 peers", "TCP connect, 500 peers")
    sizes = [row for row in select(rows, "ratio") if row.of["masks"] != 8]
    lines = series(sizes, "call", "selectors")
    draw_lines(
        plot, {call: sorted(lines[call], key=lambda at: at[0]) for call in calls if call in lines}
    )
    plot.set(xscale="log", yscale="log", xlabel="selectors", ylabel="gated / without hooks")
    whole(plot.xaxis)
    ticks = [1, 2, 4, 8]
    plot.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    plot.set_yticks([], minor=True)
    return figure


def growth(rows: Sequence[Row]) -> Figure:
    """Time from a notification to the bytes for the maps, by the number of tunnels."""
    figure, plot = axes(5.0)
    names = {
        "SA deleted: closed, now": "close",
        "new SA: open, now": "open",
        "SA deleted: closed, before": "close, before",
        "new SA: open, before": "open, before",
    }
    found = {title: select(rows, name) for title, name in names.items()}
    draw_lines(plot, {t: [(r.of["tunnels"], r) for r in some] for t, some in found.items() if some})
    plot.set(xscale="log", yscale="log", xlabel="tunnels", ylabel="processor time, µs")
    whole(plot.xaxis)
    whole(plot.yaxis)
    return figure


PLOTS: dict[str, dict[str, Callable[[Sequence[Row]], Figure]]] = {
    "first_connection": {"first-connection.svg": first_connection},
    "failure": {"failure.svg": failure},
    "hot_path": {"hot-path.svg": hot_path, "hot-path-growth.svg": hot_path_growth},
    "growth": {"growth.svg": growth},
}
"""The plots of each part, by the name of the file."""


def draw(part: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the plots of a part into a folder; return the files. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure_of in PLOTS.get(part, {}).items():
        with mpl.rc_context(SETTINGS):
            figure = figure_of(rows)
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
        files.append(folder / name)
    return files
