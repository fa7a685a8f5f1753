"""demo: first connections on two hosts of this machine, without the gate and with it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.errors import GateError
from ipsecgate.lab import first_connection, guest
from ipsecgate.lab.hosts import MODES
from ipsecgate.lab.kernel import missing_feature

Document = dict[str, Any]

GUEST_LIMIT = 300.0
RESULT = "demo.json"


@verb(
    examples=[
        ("ipsecgate demo", "Compare first connections on a path of 25 ms."),
        (
            "ipsecgate demo --delay 100 --mode transport",
            "Compare them on a slow path, in transport mode.",
        ),
    ]
)
@click.option(
    "--delay",
    default=25.0,
    show_default=True,
    metavar="MS",
    help="Delay each packet between the hosts by MS milliseconds.",
)
@click.option(
    "--mode",
    type=click.Choice([*MODES, "both"]),
    default="both",
    show_default=True,
    help="The IPsec mode of the connections.",
)
@click.option(
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also save the output as an SVG image.",
)
@click.pass_obj
def demo(app: App, delay: float, mode: str, svg: Path | None) -> int:
    """Compare first connections with and without the gate.

    Builds two hosts with real IKE and real ESP in network namespaces, in a test kernel if
    this machine's kernel has no ESP or no IPv6. Nothing remains afterwards, even after Ctrl-C.

    Exits with 1 if a gated connection failed, lost packets or sent any in clear.
    """
    if find_spec("pyroute2") is None:
        raise GateError(
            "the demo needs the Python module pyroute2, which is not installed",
            hint="run `make demo` in a checkout, or use the pip of ipsecgate's own environment to"
            " install 'ipsecgate[demo]'",
        )
    missing = missing_feature()
    if missing is None:
        document = _here(delay, mode, Console(stderr=app.json, highlight=False))
    else:
        document = _in_guest(missing, delay, mode)
    outcomes = [
        first_connection.Outcome(**{**case, "case": first_connection.Case(**case["case"])})
        for case in document["cases"]
    ]
    if app.json:
        app.document(document)
    else:
        app.out.print(summary(outcomes, document))
    if svg is not None:
        picture = Console(record=True, width=92, file=io.StringIO(), highlight=False)
        picture.print(Group(*map(line, outcomes), Text(), summary(outcomes, document)))
        picture.save_svg(str(svg), title="ipsecgate demo")
    return 0 if all(_clean(o) for o in outcomes if o.case.gated) else 1


def _here(delay: float, mode: str, console: Console) -> Document:
    """Run the demo under a live timeline, return its document."""
    if os.geteuid():
        raise GateError("the demo has to create network namespaces", hint="run it as root")
    wanted = first_connection.cases(modes=MODES if mode == "both" else (mode,))
    outcomes: list[first_connection.Outcome] = []
    spinner = Spinner("dots", "")

    def progress(text: str) -> None:
        spinner.update(text=Text(text, "dim"))
        if not console.is_terminal:
            console.print(text)

    with (
        Live(spinner, console=console, transient=True, refresh_per_second=8),
        contextlib.closing(first_connection.measure_all(wanted, delay, progress)) as measured,
    ):
        for outcome in measured:
            outcomes.append(outcome)
            console.print(line(outcome))
    return {
        "kernel": platform.release(),
        "delay_ms": delay,
        "datagrams": first_connection.DATAGRAMS,
        "cases": [asdict(outcome) for outcome in outcomes],
    }


def _in_guest(missing: str, delay: float, mode: str) -> Document:
    """Run the demo in a test kernel: its timeline on our stderr, its document back."""
    errors = Console(stderr=True, highlight=False)
    errors.print(
        f"Linux {platform.release()} has no {missing}: running in a test kernel", style="dim"
    )

    def progress(text: str) -> None:
        errors.print(text, style="dim", markup=False)

    def on_output(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    options = ["--delay", str(delay), "--mode", mode]
    command = [sys.executable, "-P", "-m", "ipsecgate", "--json", "demo", *options]
    with tempfile.TemporaryDirectory() as folder:
        result = guest.run(
            ["sh", "-c", f'exec "$@" > "$IPSECGATE_RESULTS/{RESULT}"', "sh", *command],
            timeout=GUEST_LIMIT,
            results=Path(folder),
            on_output=on_output,
            terminal=sys.stderr.isatty(),
            progress=progress,
        )
        try:
            document: Document = json.loads((Path(folder) / RESULT).read_text())
        except (OSError, ValueError):
            raise GateError(
                f"the demo failed in the test kernel with exit code {result.exit_code}",
                hint="its output is above",
            ) from None
    return document


def _clean(outcome: first_connection.Outcome) -> bool:
    return not (
        outcome.syn_retransmissions
        or outcome.datagrams_lost
        or outcome.clear_packets
        or outcome.error
    )


def line(outcome: first_connection.Outcome) -> Text:
    """Return the line of the timeline for one case."""
    good = _clean(outcome)
    text = Text.assemble(
        ("✓ " if good else "✗ ", "green" if good else "red"),
        ("with    ", "bold cyan") if outcome.case.gated else "without ",
        f"{_short(outcome.case):<18}  SA up {_ms(outcome.sa_ready):>4} ms, ",
    )
    if outcome.error is not None:
        return text.append(outcome.error, "red")
    if outcome.case.protocol == "tcp":
        text.append(f"connected {_ms(outcome.connected):>4} ms, ")
        return text.append(f"{outcome.syn_retransmissions} SYN lost")
    return text.append(f"{outcome.datagrams_lost} of {first_connection.DATAGRAMS} datagrams lost")


def _short(case: first_connection.Case) -> str:
    return f"{case.protocol.upper()} IPv{case.family} {case.mode}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def summary(outcomes: Sequence[first_connection.Outcome], document: Document) -> RenderableType:
    """Return the closing table, each figure without the gate and with it, and its explanation."""
    table = Table(
        title="First connections to a protected peer, without the gate and with it",
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("\nConnection", no_wrap=True)
    for name in ("SA up\nms", "Connect\nms", "Packets\nlost", "Packets\nin clear"):
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column(
            "\nwith", justify="right", header_style="bold cyan", no_wrap=True, min_width=4
        )
    by_case: dict[str, list[first_connection.Outcome]] = {}
    for outcome in outcomes:
        by_case.setdefault(_short(outcome.case), []).append(outcome)
    for name, pair in by_case.items():
        cells = zip(*(_cells(outcome) for outcome in pair), strict=True)
        table.add_row(name, *(cell for both in cells for cell in both))
    return Group(table, *_explanation(outcomes, document))


def _cells(outcome: first_connection.Outcome) -> list[Text]:
    tcp = outcome.case.protocol == "tcp"
    lost = outcome.syn_retransmissions if tcp else outcome.datagrams_lost
    return [
        Text(_ms(outcome.sa_ready)),
        Text(_ms(outcome.connected) if tcp else "-"),
        Text(outcome.error or str(lost), "red" if lost or outcome.error else "green"),
        Text(str(outcome.clear_packets), "red" if outcome.clear_packets else "green"),
    ]


def _explanation(outcomes: Sequence[first_connection.Outcome], document: Document) -> list[Text]:
    gated = [o for o in outcomes if o.case.gated]
    released = [o.released for o in gated if o.released is not None]
    lines = [
        f"Linux {document['kernel']}, strongSwan with a pre-shared key and trap policies, a delay "
        f"of {document['delay_ms']:g} ms each way. With the gate, the client retries every "
        f"millisecond while it is refused ({sum(o.refused for o in gated)} times).",
        "Packets lost: SYNs that the kernel retransmitted, or datagrams that the receiver missed. "
        "Packets in clear: seen by a capture between the hosts. SA up: notified by the kernel.",
    ]
    if released:
        lines.append(
            "Time from the SA's policy in the kernel to the start of the attempt that succeeded: "
            f"median {median(released):.1f} ms of {len(released)}."
        )
    return [Text(text, "dim") for text in lines]
