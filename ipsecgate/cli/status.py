"""status: what is gated, what is covered, what was refused."""

from __future__ import annotations

import click

from ipsecgate.admin.status import status_of
from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.errors import GateError
from ipsecgate.printable import printable_document


@verb(
    examples=[
        ("ipsecgate status", "Show everything; the exit code is 0 if all is well."),
        ("ipsecgate --json status | jq .counters", "Print one part, for a script."),
    ]
)
@click.pass_obj
def status(app: App) -> int:
    """Show hooks, policies and coverage, SAs, held calls and counters.

    Exits with 0 if the gate is healthy. Exits with 1 if no controller runs, no policies are
    known yet, a gated cgroup has been removed, or an error is shown.
    """
    try:
        document = status_of(app.paths, app.config)
    except FileNotFoundError as error:
        raise GateError(
            f"the hooks of instance {app.paths.instance!r} are not loaded: nothing is gated",
            hint="start the controller with `ipsecgate run`, or only load the hooks with "
            "`ipsecgate load`",
        ) from error
    if app.json:
        app.document(document)
    else:
        from ipsecgate.cli.status_screen import screen  # noqa: PLC0415 - rich takes 25 ms

        app.out.print(screen(printable_document(document)))
    attached = all(hook["attached"] for hook in document["hooks"])
    healthy = document["controller"]["alive"] and not document["errors"] and attached
    return 0 if healthy and document["published"] else 1
