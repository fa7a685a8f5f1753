"""check: does this machine have what the gate needs? One line for each need."""

from __future__ import annotations

import click
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.check import examine
from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.printable import printable, printable_lines


@verb(
    examples=[
        ("ipsecgate check", "Find out what is missing on this machine."),
        (
            "ipsecgate --json check | jq '.[] | select(.ok | not)'",
            "Print only what is missing, for a script.",
        ),
    ]
)
@click.pass_obj
def check(app: App) -> int:
    """Check that this machine has what the gate needs.

    Tries kernel, bpffs, cgroup2, hooks, configuration, strongSwan and ESP, and changes
    nothing. Exits with 4 if the kernel lacks something, with 2 if the configuration is
    invalid, and with 1 if anything else is missing.
    """
    findings = examine(app.paths, app.config)
    if app.json:
        app.document(
            [{"name": f.name, "ok": f.ok, "found": f.found, "hint": f.hint} for f in findings]
        )
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for column in ("state", "name", "found"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            state = Text("ok", "green") if finding.ok else Text("failed", "bold red")
            found: list[RenderableType] = [Text(printable_lines(finding.found))]
            if finding.hint:
                hint = Text(printable_lines(finding.hint), "yellow")
                found.append(Padding(hint, (0, 0, 0, 2)))
            table.add_row(state, printable(finding.name), Group(*found))
        app.out.print(table)
    return max((f.exit_code for f in findings if not f.ok), default=0)
