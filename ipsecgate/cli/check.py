"""check: does this machine have what the gate needs, and do its parts fit?"""

from __future__ import annotations

from collections import Counter

import click
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.check import examine
from ipsecgate.cli.app import App
from ipsecgate.cli.tables import number
from ipsecgate.cli.verb import verb
from ipsecgate.core.check.finding import Finding, State, exit_code
from ipsecgate.printable import printable, printable_lines

ORDER = (State.OK, State.WARNING, State.MISSING)  # what must be mended is read last
COLOURS = {State.OK: "green", State.WARNING: "yellow", State.MISSING: "bold red"}


@verb(
    examples=[
        ("ipsecgate check", "Find out what is missing or does not fit."),
        (
            "ipsecgate --json check | jq '.[] | select(.state != \"ok\")'",
            "Print only what needs a look, for a script.",
        ),
    ]
)
@click.pass_obj
def check(app: App) -> int:
    """Check what is missing or does not fit, and say what to do.

    Tries kernel, bpffs, cgroup2 and hooks; compares the policies with strongSwan's
    connections, and these with its plugins and this host's addresses; looks at other
    tools' BPF programs, the clock, limits and installed units. Changes nothing.

    Each line is ok, a warning or missing. Those to look at come last, and say what to do.
    Exits with 0 if nothing is missing, even with warnings; with 4 if the kernel lacks
    something, with 2 if the configuration is invalid, and with 1 if anything else is missing.
    """
    findings = examine(app.paths, app.config)
    if app.json:
        app.document([document(finding) for finding in findings])
    else:
        app.out.print(screen(findings))
    return exit_code(findings)


def document(finding: Finding) -> dict[str, str]:
    """Return a finding as JSON has it. `state`: ok, warning or missing; `hint`: what to do."""
    return {
        "name": finding.name,
        "state": finding.state.value,
        "found": finding.found,
        "hint": finding.hint,
    }


def screen(findings: list[Finding]) -> RenderableType:
    """Draw the findings, those that need a look last, and a line that counts them.

    A finding is its state, its name, what was found, and below it what to do.
    """
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("state", no_wrap=True)
    table.add_column("name", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in sorted(findings, key=lambda one: ORDER.index(one.state)):
        state = Text(finding.state.value, COLOURS[finding.state])
        found: list[RenderableType] = [Text(printable_lines(finding.found))]
        if finding.hint:
            hint = Text(f"next: {printable_lines(finding.hint)}", COLOURS[State.WARNING])
            found.append(Padding(hint, (0, 0, 0, 2)))
        table.add_row(state, printable(finding.name), Group(*found))
    return Group(table, Text(), summary(findings))


def summary(findings: list[Finding]) -> Text:
    """Return how many findings there are of each state."""
    counts = Counter(one.state for one in findings)
    fine = f"{counts[State.OK]} ok"
    if not (counts[State.MISSING] or counts[State.WARNING]):
        return Text(f"Nothing is missing: {fine}.", COLOURS[State.OK])
    words = [f"{counts[State.MISSING]} missing"] if counts[State.MISSING] else []
    if counts[State.WARNING]:
        words.append(number(counts[State.WARNING], "warning"))
    worst = State.MISSING if counts[State.MISSING] else State.WARNING
    return Text.assemble((", ".join(words), COLOURS[worst]), f" (above), {fine}.")
