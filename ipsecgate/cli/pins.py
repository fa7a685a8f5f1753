"""load, unload, attach, detach: the pins and the gated cgroups."""

from __future__ import annotations

import click

from ipsecgate.admin import loader
from ipsecgate.cli.app import App
from ipsecgate.edges.host import saved_state
from ipsecgate.errors import UsageError
from ipsecgate.paths import Paths


@click.command()
@click.option("--attach", "gate", is_flag=True, help="Gate the configured cgroups that exist, too.")
@click.pass_obj
def load(app: App, gate: bool) -> None:
    """Pin the hooks and their maps; load again to take over those that are there.

    New pins refuse whatever is not loopback until a controller publishes. A configured
    cgroup that does not exist yet is gated by the controller when it appears. With a
    broken configuration --attach gates what a controller gated last, and fails.
    """
    try:
        targets = loader.check_targets(app.paths, app.config())
    except UsageError as error:
        if gate:
            _gate_as_before(app.paths, error)
        raise
    loader.load(app.paths)
    root = loader.pins_of(app.paths).root
    gated = loader.attach_all(app.paths, targets) if gate else []
    text = "".join(f"\ngated: {path}" for path in gated)
    app.done(f"loaded: {root}{text}", loaded=str(root), attached=[str(path) for path in gated])


def _gate_as_before(paths: Paths, error: UsageError) -> None:
    """Gate what a controller gated last, at a boot whose configuration is broken. Raises."""
    targets = saved_state.load_targets(paths.targets)
    if targets:
        loader.load(paths)
        gated = ", ".join(map(str, loader.attach_all(paths, targets))) or "nothing that exists"
        raise UsageError(f"{error}; gated as before: {gated}", hint=error.hint) from error


@click.command()
@click.option("--force", is_flag=True, help="Unload although cgroups are gated: opens the gate.")
@click.pass_obj
def unload(app: App, force: bool) -> None:
    """Remove the pins. Afterwards nothing is refused."""
    loader.unload(app.paths, force=force)
    app.done(f"unloaded: instance {app.paths.instance}", unloaded=app.paths.instance)


@click.command()
@click.argument("target")
@click.pass_obj
def attach(app: App, target: str) -> None:
    """Gate a cgroup and all below it: a PATH, unit:NAME or container:ID.

    Sockets made before their process joined the cgroup are not gated.
    """
    cgroup = loader.attach(app.paths, target)
    app.done(f"gated: {cgroup}", attached=str(cgroup))


@click.command()
@click.argument("target")
@click.pass_obj
def detach(app: App, target: str) -> None:
    """Stop gating a cgroup: as for attach, or the id of a removed one."""
    loader.detach(app.paths, target)
    app.done(f"not gated any more: {target}", detached=target)
