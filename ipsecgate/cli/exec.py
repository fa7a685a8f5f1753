"""exec: run a command whose calls are held until an SA protects them."""

from __future__ import annotations

import os
import pwd
import re
import signal
import socket
import stat
import time
from collections.abc import Sequence
from pathlib import Path

import click

from ipsecgate.admin import loader
from ipsecgate.cli import complete
from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.core.codec import seccomp as abi
from ipsecgate.core.model.policy import HOLD, HOLD_LONGEST
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.host import cgroups, control
from ipsecgate.errors import GateError, UsageError
from ipsecgate.paths import Paths

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as env(1)
# Inherited descriptors whose packets the hooks would not see: by address family, by name in /proc.
SOCKETS: dict[int, str] = {
    socket.AF_INET: "an Internet socket",
    socket.AF_INET6: "an Internet socket",
    socket.AF_PACKET: "a packet socket",
    44: "an AF_XDP socket",  # linux/socket.h
}
FILES = {
    r"anon_inode:\[io_uring\]": "an io_uring instance",
    r"/dev/(net/tun|tap\d+)": "a TUN or TAP device",
}
GATED_WITHIN = 1.0  # seconds, of a cgroup that a service has just got
UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0}


class CommandError(GateError):
    """The command itself cannot be run."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def seconds(text: str) -> float:
    """Parse a time such as 30s, 500ms, 2m or 30. Raises: BadParameter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|)", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a time such as 30s, 500ms or 2m")
    value = float(found[1]) * UNITS[found[2]]
    if value > HOLD_LONGEST:
        raise click.BadParameter(f"{text!r} is too long: at most {HOLD_LONGEST:.0f}s")
    return value


hold_option = click.option(
    "--hold",
    type=seconds,
    metavar="TIME",
    default=f"{HOLD:g}s",
    show_default=True,
    help="Hold a call for at most this time, such as 500ms, 30s or 2m.",
)
udp_option = click.option("--udp", is_flag=True, help="Also hold sendmsg() and sendmmsg().")


@verb(
    "exec",
    context_settings={"ignore_unknown_options": True},
    examples=[
        (
            "ipsecgate exec -- curl http://10.2.0.9/",
            "Run curl in the only gated cgroup. Its call waits for the SA.",
        ),
        (
            "ipsecgate exec --hold 5s --cgroup unit:dns --udp -- dig @10.2.0.53 db.example",
            "Choose the cgroup, wait 5 seconds at most, and hold datagrams, too.",
        ),
    ],
)
@hold_option
@click.option(
    "--cgroup",
    metavar="TARGET",
    shell_complete=complete.gated,
    help="Run in this gated cgroup, or in one below it; written as for attach. "
    "The default is the current cgroup if it is gated, else the only gated one.",
)
@udp_option
@click.option(
    "--user", metavar="USER", shell_complete=complete.users, help="Run the command as this user."
)
@click.argument(
    "command", nargs=-1, required=True, type=click.UNPROCESSED, shell_complete=complete.command
)
@click.pass_obj
def exec_(
    app: App,
    *,
    hold: float,
    cgroup: str | None,
    udp: bool,
    user: str | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND gated, and hold its calls until an SA protects them.

    COMMAND needs no change: its connect() and sendto() take as long as IKE does. A call
    that was held for --hold fails with ETIMEDOUT. A call whose negotiation failed fails
    with EHOSTUNREACH. COMMAND is not run if no controller runs.
    """
    account = _user(user) if user is not None else None
    refuse_inherited()
    gated = loader.gated_cgroups(app.paths)
    target = cgroups.resolve(cgroup).resolve() if cgroup else _default(gated)
    if target == cgroups.own():
        gated = _wait_gated(app.paths, target)
    join(target, gated)
    if not loader.is_gated(app.paths, os.getpid()):  # the path may name a new cgroup by now
        raise GateError(
            "the cgroup has been removed and created again, and is not gated yet",
            hint="run the command again",
        )
    with control.connected(app.paths.control) as ask:
        listener = seccomp.install(abi.program(seccomp.abi(), datagrams=udp))
        ask("hold", fd=listener, limit=hold)
        os.close(listener)
    if account is not None:
        become(account)
    run(command)


def _user(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"there is no user {name!r}") from None


def refuse_inherited() -> None:
    """Refuse to run if COMMAND would inherit a descriptor whose packets the hooks cannot see.

    A socket stays in the cgroup in which it was made. An io_uring instance may use sockets of
    other processes. Raises: GateError.
    """
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        fd = int(entry)
        if kind := _ungated_kind(fd):
            raise GateError(
                f"descriptor {fd} is {kind} from outside the gated cgroup",
                hint="the hooks would not see its packets: close it before "
                f"({fd}<&- in a shell command)",
            )


def _ungated_kind(fd: int) -> str | None:
    """Return what an inheritable descriptor is, if the hooks would not see its packets."""
    try:
        if not os.get_inheritable(fd):
            return None
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            # Without family and type Python calls getsockname(), which some families lack.
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, os.dup(fd)) as sock:
                return SOCKETS.get(sock.getsockopt(socket.SOL_SOCKET, seccomp.SO_DOMAIN))
        name = str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return None  # the descriptor with which the folder was listed
    return next((kind for file, kind in FILES.items() if re.fullmatch(file, name)), None)


def _default(gated: Sequence[Path]) -> Path:
    """Return the cgroup to run in: our own if it is gated, else the only gated one."""
    own = cgroups.own()
    if any(own.is_relative_to(cgroup) for cgroup in gated):
        return own
    if not gated:
        raise UsageError(
            "no cgroup is gated, so the command would not be", hint="first `ipsecgate attach` one"
        )
    if len(gated) > 1:
        raise UsageError(
            f"{len(gated)} cgroups are gated: {', '.join(map(str, gated))}",
            hint="choose one with --cgroup",
        )
    return gated[0]


def _wait_gated(paths: Paths, cgroup: Path) -> list[Path]:
    """Return the gated cgroups. Our own may be new: the controller gates it in a moment."""
    deadline = time.monotonic() + GATED_WITHIN
    while True:
        gated = loader.gated_cgroups(paths)
        if any(cgroup.is_relative_to(top) for top in gated) or time.monotonic() > deadline:
            return gated
        time.sleep(0.02)


def join(cgroup: Path, gated: Sequence[Path]) -> None:
    """Move this process into a gated cgroup. Raises: GateError, UsageError."""
    if not any(cgroup.is_relative_to(top) for top in gated):
        raise UsageError(f"{cgroup} is not gated", hint=f"first `ipsecgate attach {cgroup}`")
    if cgroup != cgroups.own():
        cgroups.join(cgroup)


def become(user: pwd.struct_passwd) -> None:
    """Drop root's rights, and set USER, LOGNAME and HOME."""
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.environ |= {"USER": user.pw_name, "LOGNAME": user.pw_name, "HOME": user.pw_dir}


def run(command: tuple[str, ...]) -> None:
    """Replace this process with the command. Raises: CommandError."""
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; the caller did not
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606
    except FileNotFoundError as error:
        raise CommandError(f"{command[0]}: command not found", NOT_FOUND) from error
    except OSError as error:
        raise CommandError(f"{command[0]}: {error.strerror}", NOT_EXECUTABLE) from error
