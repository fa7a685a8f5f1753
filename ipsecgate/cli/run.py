"""run: the controller in the foreground; reload: make it read its configuration again."""

from __future__ import annotations

import gc
import logging
import sys
from importlib.util import find_spec, module_from_spec

import click

from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.edges.host import control, native_journal

RELOAD_LIMIT = 90.0  # seconds


@verb(
    examples=[
        ("ipsecgate run", "Run the controller with the configuration in /etc/ipsecgate."),
        (
            "ipsecgate --config ./test.toml --verbose run",
            "Try another configuration, with debug messages.",
        ),
    ]
)
@click.pass_obj
def run(app: App) -> None:
    """Run the controller in the foreground.

    It loads the hooks, or takes over those that are loaded, gates the configured cgroups
    and follows IPsec until SIGTERM or SIGINT. Stopping it opens nothing: the hooks stay and
    refuse every protected flow that no SA covers.
    """
    if native_journal.is_journal():
        logging.getLogger().handlers = [native_journal.NativeJournal(app.paths.instance)]
    gc.disable()  # while modules are imported: a twentieth of the start; see controller.garbage
    _skip_package_init("vici")
    _leave_out("ssl", "_hashlib")
    import asyncio  # noqa: PLC0415

    from ipsecgate.controller import controller  # noqa: PLC0415 - it takes 100 ms

    asyncio.run(controller.run(app.paths, app.config))


@verb(
    examples=[
        ("ipsecgate reload --dry-run", "Show what the changed configuration would open and close."),
        ("ipsecgate reload", "Put the changed configuration in force."),
    ],
)
@click.option("--dry-run", is_flag=True, help="Show what would open and close, and change nothing.")
@click.pass_obj
def reload(app: App, *, dry_run: bool) -> int:
    """Make the controller read its configuration again.

    Policies, errnos, mode, default and cgroups change without a gap. An invalid
    configuration changes nothing. gate.vici and gate.sa_source cannot be reloaded: restart
    the controller, which opens nothing.

    With --dry-run, exits with 1 if the configuration would open or close anything, and with 2
    if a reload would refuse it.
    """
    if dry_run:
        return _dry_run(app)
    answer = control.ask(app.paths.control, "reload", RELOAD_LIMIT)
    app.done(f"reloaded: {app.paths.config}", **answer)
    return 0


def _dry_run(app: App) -> int:
    from ipsecgate.admin.change import refuse_restarts  # noqa: PLC0415 - only needed here
    from ipsecgate.cli.nouns import show_difference  # noqa: PLC0415

    candidate = app.config()
    refuse_restarts(app.paths, candidate)
    return show_difference(app, app.paths.config, candidate, everything=False)


def _skip_package_init(package: str) -> None:
    """Let submodules of a package be imported without running its __init__, which imports all.

    We need only vici's encoder.
    """
    spec = find_spec(package)
    if spec is not None and package not in sys.modules:
        sys.modules[package] = module_from_spec(spec)


def _leave_out(*modules: str) -> None:
    """Make modules seem not to exist. asyncio and hashlib can do without OpenSSL, and so can we.

    It would take 5 MiB.
    """
    for name in modules:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
