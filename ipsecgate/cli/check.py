"""check: can this machine do it? One line each: ok, or missing and what to do."""

from __future__ import annotations

import click
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.check import examine
from ipsecgate.cli.app import App
from ipsecgate.printable import printable, printable_lines


@click.command()
@click.pass_obj
def check(app: App) -> int:
    """Check kernel, bpffs, cgroup2, strongSwan and configuration.

    Exits with 4 if the kernel lacks something, 2 if the configuration is broken,
    1 if anything else is missing. Changes nothing.
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
            state = Text("ok", "green") if finding.ok else Text("missing", "bold red")
            found = Text(printable_lines(finding.found))
            if not finding.ok:
                found.append(f"\n{printable_lines(finding.hint)}", style="yellow")
            table.add_row(state, printable(finding.name), found)
        app.out.print(table)
    return max((f.exit_code for f in findings if not f.ok), default=0)
