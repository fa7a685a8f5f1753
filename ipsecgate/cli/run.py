"""run: the controller in the foreground; reload: have it read its configuration anew."""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec, module_from_spec

import click

from ipsecgate.cli.app import App
from ipsecgate.edges.host import control

RELOAD_LIMIT = 90.0  # seconds


@click.command()
@click.pass_obj
def run(app: App) -> None:
    """Run the controller: loads or takes over the pins, follows IPsec, until told to end.

    Ending it, however, opens nothing: the hooks keep refusing what no SA covers.
    """
    _import_only_parts_of("pyroute2")
    from ipsecgate.controller import controller  # noqa: PLC0415 - it takes 100 ms

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


def _import_only_parts_of(package: str) -> None:
    """Have the parts of a package imported without the package itself, which imports them all.

    Of pyroute2 we need the transport; the whole is 9 of 40 MiB, for as long as we run.
    """
    spec = find_spec(package)
    if spec is not None and package not in sys.modules:
        sys.modules[package] = module_from_spec(spec)
