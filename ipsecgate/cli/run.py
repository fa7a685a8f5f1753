"""run: the controller in the foreground."""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec, module_from_spec

import click

from ipsecgate.cli.app import App


@click.command()
@click.pass_obj
def run(app: App) -> None:
    """Run the controller: loads or takes over the pins, follows IPsec, until told to end.

    Ending it, however, opens nothing: the hooks keep refusing what no SA covers.
    """
    _import_only_parts_of("pyroute2")
    from ipsecgate import controller  # noqa: PLC0415

    asyncio.run(controller.run(app.paths, app.config()))


def _import_only_parts_of(package: str) -> None:
    """Have the parts of a package imported without the package itself, which imports them all.

    Of pyroute2 we need the transport; the whole is 9 of 40 MiB, for as long as we run.
    """
    spec = find_spec(package)
    if spec is not None and package not in sys.modules:
        sys.modules[package] = module_from_spec(spec)
