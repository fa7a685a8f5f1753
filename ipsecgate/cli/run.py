"""run: the controller in the foreground; reload: have it read its configuration anew."""

from __future__ import annotations

import asyncio

import click

from ipsecgate import controller
from ipsecgate.cli.app import App
from ipsecgate.edges import control

RELOAD_LIMIT = 90.0  # seconds


@click.command()
@click.pass_obj
def run(app: App) -> None:
    """Run the controller: loads or takes over the pins, follows IPsec, until told to end.

    Ending it, however, opens nothing: the hooks keep refusing what no SA covers.
    """
    asyncio.run(controller.run(app.paths, app.config))


@click.command()
@click.pass_obj
def reload(app: App) -> None:
    """Have the controller read its configuration anew: whole, or refused whole.

    Policies, errnos, mode, default and cgroups change without a window. A configuration
    that is refused changes nothing. `vici` and `sa_source` need a restart, which opens nothing.
    """
    told = control.ask(app.paths.control, "reload", RELOAD_LIMIT)
    app.done(f"in force: {app.paths.config}", **told)
