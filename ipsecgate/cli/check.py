"""check: does this machine have what the gate needs, and do its parts fit? A line for each need."""

from __future__ import annotations

import click
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.check import examine
from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.core.check.finding import Finding, State, exit_code
from ipsecgate.printable import printable, printable_lines

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

    Each line is ok, a warning or missing, and says what to do. Exits with 0 if nothing is
    missing, even with warnings; with 4 if the kernel lacks something, with 2 if the
    configuration is invalid, and with 1 if anything else is missing.
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


def screen(findings: list[Finding]) -> Table:
    """Draw the findings: state, name, what was found, and below it what to do."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("state", "name", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        state = Text(finding.state.value, COLOURS[finding.state])
        found: list[RenderableType] = [Text(printable_lines(finding.found))]
        if finding.hint:
            hint = Text(printable_lines(finding.hint), COLOURS[State.WARNING])
            found.append(Padding(hint, (0, 0, 0, 2)))
        table.add_row(state, printable(finding.name), Group(*found))
    return table
