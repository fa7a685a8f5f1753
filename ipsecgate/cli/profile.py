"""seccomp-profile: the profile that makes a container runtime hand us its calls to hold."""

from __future__ import annotations

import platform
from pathlib import Path

import click

from ipsecgate.cli.app import App
from ipsecgate.cli.exec import hold_option, udp_option
from ipsecgate.cli.verb import verb
from ipsecgate.core.codec import oci
from ipsecgate.edges.holding import seccomp
from ipsecgate.errors import UsageError


@verb(
    examples=[
        (
            "ipsecgate seccomp-profile >/etc/ipsecgate/hold.json",
            "Write a profile for podman run --security-opt seccomp=FILE.",
        ),
        (
            "ipsecgate seccomp-profile --base /usr/share/containers/seccomp.json",
            "Keep podman's own restrictions.",
        ),
    ]
)
@hold_option
@udp_option
@click.option(
    "--runtime",
    type=click.Choice(("crun", "runc")),
    default="crun",
    show_default=True,
    help="The runtime that reads the profile, also below podman. runc 1.1 accepts no flags.",
)
@click.option(
    "--base",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A profile that stays in force for all other calls. Without it they are allowed.",
)
@click.pass_obj
def seccomp_profile(app: App, *, hold: float, udp: bool, runtime: str, base: Path | None) -> None:
    """Print a seccomp profile that makes the gate hold a container's calls.

    It is the `linux.seccomp` object of the OCI runtime specification. podman reads it with
    --security-opt seccomp=FILE.
    """
    seccomp.abi()  # raises KernelLacksError where no call can be held
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
        reason = error if isinstance(error, oci.OciError) else "not a seccomp profile"
        raise UsageError(
            f"{base}: {reason}",
            hint="use a profile such as /usr/share/containers/seccomp.json: it has no listener, "
            "and allows connect and sendto unconditionally",
        ) from error
    app.document(made)
