"""demo: the whole story on this machine, with and without the gate."""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import tempfile
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

Document = dict[str, Any]

GUEST_LIMIT = 300.0
RESULT = "demo.json"


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
    if has_esp():
        told = _here(delay, mode, Console(stderr=app.json, highlight=False))
    else:
        told = _in_guest(delay, mode)
    outcomes = [
        story.Outcome(**{**case, "case": story.Case(**case["case"])}) for case in told["cases"]
    ]
    if app.json:
        app.document(told)
    else:
        app.out.print(closing(outcomes, told))
    if svg is not None:
        picture = Console(record=True, width=100, file=io.StringIO(), highlight=False)
        picture.print(Group(*map(line, outcomes), Text(), closing(outcomes, told)))
        picture.save_svg(str(svg), title="ipsecgate demo")
    return 0 if all(_clean(o) for o in outcomes if o.case.gated) else 1


def _here(delay: float, mode: str, console: Console) -> Document:
    """Run the story under a live timeline, return its document."""
    if os.geteuid():
        raise GateError("the demo makes network namespaces", hint="run it as root")
    wanted = story.cases(modes=MODES if mode == "both" else (mode,))
    outcomes: list[story.Outcome] = []
    spinner = Spinner("dots", "")

    def progress(text: str) -> None:
        spinner.update(text=Text(text, "dim"))
        if not console.is_terminal:
            console.print(text)

    with Live(spinner, console=console, transient=True, refresh_per_second=8):
        for outcome in story.tell(wanted, delay, progress):
            outcomes.append(outcome)
            console.print(line(outcome))
    return {
        "kernel": platform.release(),
        "delay_ms": delay,
        "datagrams": story.DATAGRAMS,
        "cases": [asdict(outcome) for outcome in outcomes],
    }


def _in_guest(delay: float, mode: str) -> Document:
    """Run the story in a test kernel: its timeline on our stderr, its document back."""
    errors = Console(stderr=True, highlight=False)
    errors.print(
        f"Linux {platform.release()} has no ESP: running in a test kernel (user-mode-linux)",
        style="dim",
    )

    def say(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    options = ["--delay", str(delay), "--mode", mode]
    command = [sys.executable, "-m", "ipsecgate", "--json", "demo", *options]
    with tempfile.TemporaryDirectory() as folder:
        result = guest.run(
            ["sh", "-c", f'exec "$@" > "$IPSECGATE_RESULTS/{RESULT}"', "sh", *command],
            timeout=GUEST_LIMIT,
            results=Path(folder),
            on_output=say,
            terminal=sys.stderr.isatty(),
        )
        try:
            told: Document = json.loads((Path(folder) / RESULT).read_text())
        except (OSError, ValueError):
            raise GateError(
                f"the demo ended with {result.exit_code} in the test kernel",
                hint="what it said is above",
            ) from None
    return told


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


def closing(outcomes: Sequence[story.Outcome], told: Document) -> RenderableType:
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
    return Group(table, Text(), *_words(outcomes, told))


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


def _words(outcomes: Sequence[story.Outcome], told: Document) -> list[Text]:
    released = [o.released for o in outcomes if o.case.gated and o.released is not None]
    lines = [
        f"Two hosts with strongSwan and real ESP on Linux {told['kernel']}, PSK, a trap policy, "
        f"{told['delay_ms']:g} ms one way. Without the gate: the kernel's defaults.",
        "SYNs: the kernel's counter. Datagrams: counted by the receiver. "
        "In clear: a capture between the hosts.",
    ]
    if released:
        lines.append(
            "From the winning policy to the start of the attempt that succeeded, the client "
            f"retrying every millisecond: median {median(released):.1f} ms of {len(released)}."
        )
    return [Text(text, "dim") for text in lines]
