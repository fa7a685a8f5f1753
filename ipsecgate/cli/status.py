"""status: one screen for whoever is on call: what is gated, what is refused, why, what to do."""

from __future__ import annotations

import time

import click

from ipsecgate.admin.status import status_of
from ipsecgate.admin.status_document import Status
from ipsecgate.cli.app import App
from ipsecgate.cli.nouns import loaded
from ipsecgate.cli.verb import verb
from ipsecgate.errors import GateError, TimedOutError
from ipsecgate.printable import printable_document

PERIOD = 0.2  # seconds between two looks of --wait


@verb(
    examples=[
        ("ipsecgate status", "Show what is wrong, what is gated and what is refused."),
        ("ipsecgate status --brief", "Print one line, for a monitoring system."),
        (
            "ipsecgate status --wait --timeout 60",
            "Wait at most a minute until the controller is ready.",
        ),
    ],
)
@click.option(
    "--brief", is_flag=True, help="Print one line, and a second one if something is wrong."
)
@click.option(
    "--wait",
    is_flag=True,
    help="First wait until a controller is ready and the policies are known.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Wait no longer than this. Exits with 124 then. Default: no limit.",
)
@click.pass_obj
def status(app: App, *, brief: bool, wait: bool, timeout: float | None) -> int:
    """Show what is gated, what is refused and why, and what to do.

    Details are in policies, sas, flows, cgroups and holds. Exits with 0 if the gate is
    healthy. Exits with 1 if no controller runs, no policies are known yet, a gated cgroup has
    been removed, or the controller reports an error. Flows that are refused do not change
    that: the screen and --brief say how many were refused in the last 10 minutes, and still are.
    """
    document = _waited(app, timeout) if wait else _read(app)
    if app.json:
        app.document(document)
    else:
        from ipsecgate.cli import status_screen  # noqa: PLC0415 - rich takes 25 ms

        shown = printable_document(document)
        if brief:
            app.out.print(status_screen.brief(shown), soft_wrap=True)
        else:
            app.out.print(status_screen.screen(shown))
    return 0 if document["healthy"] or wait else 1


def _read(app: App) -> Status:
    with loaded(app):
        return status_of(app.paths, app.config)


def _waited(app: App, timeout: float | None) -> Status:
    """Return the status once the gate is ready. Raises: TimedOutError with the cause."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        try:
            document = _read(app)
        except GateError as error:
            cause, hint = str(error), error.hint
        else:
            if document["controller"]["ready"] and document["published"]:
                return document
            problem = document["problems"][0]
            cause, hint = problem["text"], problem["advice"]
        if end is not None and time.monotonic() >= end:
            raise TimedOutError(f"not ready after {timeout:g} s: {cause}", hint=hint)
        time.sleep(PERIOD)
