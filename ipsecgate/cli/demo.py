"""demo: the whole story on this machine, with and without the gate."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ipsecgate.cli.app import App
from ipsecgate.edges.probe import has_esp
from ipsecgate.errors import GateError
from ipsecgate.lab import guest, story
from ipsecgate.lab.hosts import MODES

GUEST_LIMIT = 300.0


@click.command()
@click.option("--delay", default=25.0, show_default=True, help="Of the path, ms one way.")
@click.option("--mode", type=click.Choice([*MODES, "both"]), default="both", show_default=True)
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), help="Save a picture.")
@click.pass_obj
def demo(app: App, delay: float, mode: str, svg: Path | None) -> int:
    """Two hosts, real IKE, real ESP: a first connection without the gate and with it.

    All of it in network namespaces of its own; where this machine's kernel has no
    ESP, in a test kernel. Nothing is left behind, also after Ctrl-C.
    """
    if not has_esp():
        return _in_guest(app, svg)
    if os.geteuid():
        raise GateError("the demo makes network namespaces", hint="run it as root")
    modes = MODES if mode == "both" else (mode,)
    wanted = story.cases(modes=modes)
    console = Console(record=svg is not None, highlight=False, stderr=app.json)
    outcomes = _tell(wanted, delay, console)
    if app.json:
        app.document(document(outcomes, delay))
    else:
        console.print(closing(outcomes, delay))
    if svg is not None:
        console.save_svg(str(svg), title="ipsecgate demo")
    return 0 if all(_clean(o) for o in outcomes if o.case.gated) else 1


def _in_guest(app: App, svg: Path | None) -> int:
    """Run the same command line in a test kernel, and pass its screen on."""

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    Console(stderr=True).print(
        f"Linux {platform.release()} has no ESP: running in a test kernel (user-mode-linux)",
        style="dim",
    )
    arguments = list(sys.argv[1:])
    if svg is not None:
        # The guest's files are its own: only the results folder comes back.
        svg.parent.mkdir(parents=True, exist_ok=True)
        arguments = [str(svg.absolute()) if word == str(svg) else word for word in arguments]
    result = guest.run(
        [sys.executable, "-m", "ipsecgate", *arguments],
        timeout=GUEST_LIMIT,
        results=svg.absolute().parent if svg is not None else None,
        on_output=say,
        terminal=not app.json and sys.stdout.isatty(),
    )
    return result.exit_code


def _tell(wanted: Sequence[story.Case], delay: float, console: Console) -> list[story.Outcome]:
    """Run the story under a live timeline."""
    outcomes: list[story.Outcome] = []
    lines: list[Text] = []
    spinner = Spinner("dots", "")

    def progress(text: str) -> None:
        spinner.update(text=Text(text, "dim"))
        if not console.is_terminal:
            console.print(text)

    with Live(console=console, transient=True, refresh_per_second=8) as live:

        def draw() -> None:
            live.update(Group(*lines[-20:], spinner))

        draw()
        for outcome in story.tell(wanted, delay, progress):
            outcomes.append(outcome)
            lines.append(line(outcome))
            draw()
    return outcomes


def _clean(outcome: story.Outcome) -> bool:
    return not (
        outcome.syn_retransmissions
        or outcome.datagrams_lost
        or outcome.clear_packets
        or outcome.error
    )


def line(outcome: story.Outcome) -> Text:
    """Return one event of the timeline."""
    mark = Text("✓ " if _clean(outcome) else "✗ ", "green" if _clean(outcome) else "red")
    text = Text.assemble(
        mark,
        (
            "with    " if outcome.case.gated else "without ",
            "bold cyan" if outcome.case.gated else "",
        ),
        f"{outcome.case!s:<32}",
        f" SA after {_ms(outcome.sa_ready):>6} ms, ",
    )
    if outcome.case.protocol == "tcp":
        text.append(f"connected after {_ms(outcome.connected):>6} ms, ")
        text.append(f"{outcome.syn_retransmissions} SYN retransmitted")
    else:
        text.append(f"{outcome.datagrams_lost} of {story.DATAGRAMS} datagrams lost")
    return text


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def closing(outcomes: Sequence[story.Outcome], delay: float) -> RenderableType:
    """Return the closing table, and in words what was done where."""
    table = Table(title="The first connection to a protected peer", title_style="bold")
    table.add_column("")
    for name in (
        "first try\nto SA, ms",
        "first try to\nconnected, ms",
        "SYNs\nretransmitted",
        f"datagrams lost\nof {story.DATAGRAMS}",
        "packets\nin clear",
        "refused\nattempts",
    ):
        table.add_column(name, justify="right")
    by_case: dict[str, list[story.Outcome]] = {}
    for outcome in outcomes:
        by_case.setdefault(str(outcome.case), []).append(outcome)
    for name, pair in by_case.items():
        table.add_section()
        for outcome in pair:
            gate = Text("  with the gate", "bold cyan") if outcome.case.gated else Text(f"{name}")
            table.add_row(gate, *_cells(outcome))
    return Group(table, Text(), *_words(outcomes, delay))


def _cells(outcome: story.Outcome) -> list[Text]:
    def cell(value: float | None, *, zero_wanted: bool = False) -> Text:
        style = ("green" if value == 0 else "red") if zero_wanted and value is not None else ""
        return Text(_ms(value), style)

    tcp = outcome.case.protocol == "tcp"
    return [
        cell(outcome.sa_ready),
        cell(outcome.connected) if tcp else Text("-"),
        cell(outcome.syn_retransmissions, zero_wanted=True) if tcp else Text("-"),
        cell(outcome.datagrams_lost, zero_wanted=True),
        cell(outcome.clear_packets, zero_wanted=True),
        cell(outcome.refused) if outcome.case.gated else Text("-"),
    ]


def _words(outcomes: Sequence[story.Outcome], delay: float) -> list[Text]:
    released = [o.released for o in outcomes if o.case.gated and o.released is not None]
    lines = [
        f"Two hosts with strongSwan and real ESP on Linux {platform.release()}, "
        f"{delay:g} ms one way, PSK, a trap policy. Without the gate: the kernel's defaults.",
        "SYNs: the kernel's counter. Datagrams: counted by the receiver. "
        "In clear: a capture between the hosts.",
    ]
    if released:
        lines.append(
            "From the SA to the start of the attempt that succeeded, the client retrying every "
            f"millisecond: median {median(released):.1f} ms of {len(released)}."
        )
    return [Text(text, "dim") for text in lines]


def document(outcomes: Sequence[story.Outcome], delay: float) -> dict[str, Any]:
    """Return the demo as one JSON document; times in milliseconds."""
    return {
        "kernel": platform.release(),
        "delay_ms": delay,
        "datagrams": story.DATAGRAMS,
        "cases": [asdict(outcome) for outcome in outcomes],
    }
