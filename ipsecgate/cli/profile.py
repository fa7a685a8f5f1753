"""seccomp-profile: what a container runtime needs to have its container's calls held."""

from __future__ import annotations

import platform
from pathlib import Path

import click

from ipsecgate.cli.app import App
from ipsecgate.cli.exec import seconds
from ipsecgate.core.codec import oci
from ipsecgate.core.model.policy import HOLD
from ipsecgate.edges.holding import seccomp
from ipsecgate.errors import UsageError


@click.command()
@click.option("--hold", type=seconds, default=f"{HOLD:g}s", help="How long a call may wait (30s).")
@click.option("--udp", is_flag=True, help="Hold sendmsg() and sendmmsg(), too.")
@click.option(
    "--runtime",
    type=click.Choice(("crun", "runc")),
    default="crun",
    help="Which one reads it, under podman as well: runc 1.1 takes no flags (crun).",
)
@click.option(
    "--base",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A profile that stays in force for all other calls.",
)
@click.pass_obj
def seccomp_profile(app: App, *, hold: float, udp: bool, runtime: str, base: Path | None) -> None:
    """Print the seccomp profile of a container whose calls are held.

    It is a container's `linux.seccomp` in the OCI specification's words, and what podman
    takes in --security-opt seccomp=FILE. Without --base it forbids nothing.
    """
    seccomp.abi()  # where no call can be held there is no profile
    try:
        made = oci.profile(
            str(app.paths.seccomp.absolute()),
            hold,
            platform.machine(),
            datagrams=udp,
            flags=runtime == "crun",
            base=oci.base(base.read_bytes()) if base else None,
        )
    except oci.UNFIT as error:
        raise UsageError(
            f"{base}: {error}",
            hint="a profile such as /usr/share/containers/seccomp.json, with no listener and no "
            "conditions for connect and sendto",
        ) from error
    app.document(made)
