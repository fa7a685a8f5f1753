"""exec: run a command whose calls are held until they are protected."""

from __future__ import annotations

import os
import pwd
import re
import signal
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

import click

from ipsecgate.admin import loader
from ipsecgate.cli.app import App
from ipsecgate.core.codec import seccomp as abi
from ipsecgate.core.model.policy import HOLD, HOLD_LONGEST
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.host import cgroups, control
from ipsecgate.errors import GateError, UsageError

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as env(1) has it
# What may be inherited and has the packets of somebody outside: by family, by name in /proc.
SOCKETS: dict[int, str] = {
    socket.AF_INET: "an Internet socket",
    socket.AF_INET6: "an Internet socket",
    socket.AF_PACKET: "a packet socket",
    44: "an AF_XDP socket",  # linux/socket.h
}
FILES = {
    r"anon_inode:\[io_uring\]": "an io_uring",
    r"/dev/(net/tun|tap\d+)": "a TAP device",
}
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
    long = float(found[1]) * UNITS[found[2]]
    if long > HOLD_LONGEST:
        raise click.BadParameter(f"{text!r} is for ever")
    return long


@click.command("exec", context_settings={"ignore_unknown_options": True})
@click.option("--hold", type=seconds, default=f"{HOLD:g}s", help="How long a call may wait (30s).")
@click.option("--cgroup", help="A gated one, or one below it: a PATH, unit:NAME, container:ID.")
@click.option("--udp", is_flag=True, help="Hold sendmsg() and sendmmsg(), too.")
@click.option("--user", help="Run the command as this user.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
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
    """Run COMMAND gated, and hold its calls until the SA that they need is up.

    It need not know: connect() and sendto() just take as long as IKE does. A call that
    waited for --hold fails with ETIMEDOUT, one whose negotiation failed with
    EHOSTUNREACH. Without a controller the command is not run.
    """
    who = _user(user) if user is not None else None
    refuse_ways_out()
    gated = loader.gated_cgroups(app.paths)
    join(cgroups.resolve(cgroup).resolve() if cgroup else _default(gated), gated)
    if not loader.is_gated(app.paths, os.getpid()):  # by a name that was another's meanwhile
        raise GateError("the cgroup was made anew and is not gated yet", hint="run it again")
    with control.connected(app.paths.control) as ask:
        listener = seccomp.install(abi.program(seccomp.abi(), datagrams=udp))
        ask("hold", fd=listener, limit=hold)
        os.close(listener)
    if who is not None:
        become(who)
    run(command)


def _user(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"there is no user {name!r}") from None


def refuse_ways_out() -> None:
    """Refuse what the command would inherit and the hooks would not be asked about.

    A socket stays in the cgroup in which it was made, and so do those of a ring, which can
    be others' than its user's. Raises: GateError.
    """
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        fd = int(entry)
        if way := _way_out(fd):
            raise GateError(
                f"descriptor {fd} is {way} from outside the gated cgroup",
                hint=f"the hooks would not see its flows: close it ({fd}<&- in a shell)",
            )


def _way_out(fd: int) -> str | None:
    """Return which way past the hooks a descriptor is that a command would inherit, if any."""
    try:
        if not os.get_inheritable(fd):
            return None
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            # Family and type are given, not found out: some have no name to tell them by.
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, os.dup(fd)) as sock:
                return SOCKETS.get(sock.getsockopt(socket.SOL_SOCKET, seccomp.SO_DOMAIN))
        name = str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return None  # what listed the folder
    return next((way for file, way in FILES.items() if re.fullmatch(file, name)), None)


def _default(gated: Sequence[Path]) -> Path:
    """Return the cgroup to run in: our own if it is gated, else the only one that is."""
    own = cgroups.own()
    if any(own.is_relative_to(one) for one in gated):
        return own
    if len(gated) != 1:
        raise UsageError(
            f"{len(gated)} cgroups are gated: {', '.join(map(str, gated)) or 'none'}",
            hint="say which one by --cgroup" if gated else "`ipsecgate attach` one",
        )
    return gated[0]


def join(cgroup: Path, gated: Sequence[Path]) -> None:
    """Move this process into a gated cgroup. Raises: GateError, UsageError."""
    if not any(cgroup.is_relative_to(one) for one in gated):
        raise UsageError(f"{cgroup} is not gated", hint=f"`ipsecgate attach {cgroup}`")
    if cgroup != cgroups.own():
        cgroups.join(cgroup)


def become(user: pwd.struct_passwd) -> None:
    """Drop root's rights for a user's, and tell the command so."""
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.environ |= {"USER": user.pw_name, "LOGNAME": user.pw_name, "HOME": user.pw_dir}


def run(command: tuple[str, ...]) -> None:
    """Become the command. Raises: CommandError."""
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, not by our caller
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606
    except FileNotFoundError as error:
        raise CommandError(f"{command[0]}: command not found", NOT_FOUND) from error
    except OSError as error:
        raise CommandError(f"{command[0]}: {error.strerror}", NOT_EXECUTABLE) from error
