"""load, unload, attach, detach: the pinned hooks and the gated cgroups."""

from __future__ import annotations

import click

from ipsecgate.admin import loader
from ipsecgate.cli import complete
from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.edges.host import saved_state
from ipsecgate.errors import UsageError
from ipsecgate.paths import Paths


@verb(
    examples=[
        ("ipsecgate load", "Pin the hooks. New ones refuse everything until a controller runs."),
        (
            "ipsecgate load --attach",
            "Also gate the configured cgroups, as the early unit does at boot.",
        ),
    ]
)
@click.option("--attach", "gate", is_flag=True, help="Also gate the configured cgroups that exist.")
@click.pass_obj
def load(app: App, gate: bool) -> None:
    """Pin the hooks and their maps.

    Hooks that are already pinned are taken over. New ones refuse all traffic, except to
    loopback addresses, until a controller runs; in audit mode they only count it. The
    controller gates configured cgroups that are created later.

    If the configuration is invalid, --attach gates the cgroups that the last controller
    was configured to gate, and exits with 2.
    """
    try:
        config = app.config()
        targets = loader.check_targets(app.paths, config)
    except UsageError as error:
        if gate:
            _gate_last_targets(app.paths, error)
        raise
    loader.load(app.paths, audit=config.settings.audit)
    root = loader.pins_of(app.paths).root
    gated = loader.attach_all(app.paths, targets) if gate else []
    app.done(
        f"loaded: {root}",
        *(f"gated: {path}" for path in gated),
        loaded=str(root),
        attached=[str(path) for path in gated],
    )


def _gate_last_targets(paths: Paths, error: UsageError) -> None:
    """Gate the cgroups of the last valid configuration, if they are known.

    Raises: UsageError, the given one extended by their names.
    """
    targets = saved_state.load_targets(paths.targets)
    if targets:
        loader.load(paths)
        gated = ", ".join(map(str, loader.attach_all(paths, targets))) or "none that exists"
        raise UsageError(
            f"{error}; cgroups of the last valid configuration, now gated: {gated}",
            hint=error.hint,
        ) from error


@verb(
    examples=[
        ("ipsecgate unload", "Remove the hooks while nothing is gated."),
        ("ipsecgate unload --force", "Open the gate: nothing is refused any more."),
    ]
)
@click.option("--force", is_flag=True, help="Unload even if cgroups are gated.")
@click.pass_obj
def unload(app: App, force: bool) -> None:
    """Remove the hooks and their maps, which opens the gate.

    Afterwards nothing is refused. While cgroups are gated this needs --force.
    """
    loader.unload(app.paths, force=force)
    app.done(
        f"unloaded: instance {app.paths.instance}; nothing is gated", unloaded=app.paths.instance
    )


@verb(
    examples=[
        ("ipsecgate attach unit:webshop", "Gate a systemd unit."),
        ("ipsecgate attach container:webshop", "Gate a container, by its name or id."),
        ("ipsecgate attach label:tier=web", "Gate each container that has this label now."),
        ("ipsecgate attach /sys/fs/cgroup/gated.slice", "Gate a cgroup and all cgroups below it."),
    ]
)
@click.argument("target", shell_complete=complete.targets)
@click.pass_obj
def attach(app: App, target: str) -> None:
    """Gate a cgroup and all cgroups below it.

    TARGET is the path of a cgroup, unit:NAME for a systemd unit, container:NAME,
    label:KEY=VALUE or label:KEY for all containers with that label, or
    pod:NAMESPACE/NAME for pods of Kubernetes; NAME may have wildcards. Only what runs now
    is gated; gate.cgroups also gates what starts later.

    Sockets that a process made before it joined the cgroup are not gated.
    """
    gated = [str(path) for path in loader.attach(app.paths, target)]
    app.done(*(f"gated: {path}" for path in gated), attached=gated)


@verb(
    examples=[
        ("ipsecgate detach unit:webshop", "Stop gating a systemd unit."),
    ]
)
@click.argument("target", shell_complete=complete.gated)
@click.pass_obj
def detach(app: App, target: str) -> None:
    """Stop gating a cgroup.

    TARGET is as for attach, or the id that `ipsecgate status` shows for a removed cgroup.
    """
    loader.detach(app.paths, target)
    app.done(f"no longer gated: {target}", detached=target)
