"""run: the controller in the foreground."""

from __future__ import annotations

import asyncio

import click

from ipsecgate import controller
from ipsecgate.cli.app import App


@click.command()
@click.pass_obj
def run(app: App) -> None:
    """Run the controller: loads or takes over the pins, follows IPsec, until told to end.

    Ending it, however, opens nothing: the hooks keep refusing what no SA covers.
    """
    asyncio.run(controller.run(app.paths, app.config()))
