"""Run one command as root in a guest: user-mode-linux by default, on the host's files.

Rules of this module: the guest sees the host's whole root read-only, with a tmpfs above it.
/dev/shm and /run are its own. Only the results folder is shared back. It is a harness, not a
jail: its root could mount more of the host. However `run` ends, it leaves no process and no
temporary folder behind.

    python -m ipsecgate.lab.guest [--always] [--timeout S] [--results DIR] -- CMD...
    python -m ipsecgate.lab.guest --kernel qemu ... -- CMD...    (see `debian`)

If user-mode-linux does not boot, QEMU is tried.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ipsecgate.errors import GateError
from ipsecgate.lab import debian, room
from ipsecgate.lab.console import OnOutput, ignore
from ipsecgate.lab.kernel import Kernel, Progress, fetch, missing_feature
from ipsecgate.lab.qemu import Qemu
from ipsecgate.lab.signals import exit_on_sigterm
from ipsecgate.lab.uml import MEMORY, GuestError, GuestHung, GuestPanicked, Uml

__all__ = ["GuestError", "GuestHung", "GuestPanicked", "GuestResult", "run"]

SLOWER = 5
"""Factor for the timeout under QEMU, which runs at a fifth of the speed or faster."""


@dataclass(frozen=True, slots=True)
class GuestResult:
    """How a command ended. `output`: stdout and stderr, interleaved. `seconds` includes the boot.

    `files`: the files in the results folder if the caller named one, else empty.
    """

    exit_code: int
    output: str
    files: tuple[Path, ...]
    seconds: float


def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 600.0,
    results: Path | None = None,
    on_output: OnOutput = ignore,
    terminal: bool = False,
    memory: int = MEMORY,
    kernel: Kernel | None = None,
    progress: Progress = ignore,
) -> GuestResult:
    """Boot a guest, run `argv` in it as root, and return when the guest is gone.

    `env`, `cwd`: None for this process's own. `timeout`: seconds, including the boot.
    `results`: a folder (created if missing) that the command can write to under the same path,
    which is in IPSECGATE_RESULTS; None: a temporary one. `on_output` gets whole lines, or a part
    of a line after `IDLE` seconds without more. `terminal`: the command's stdout is a terminal of
    our terminal's size, else a pipe. `memory`: MiB. `kernel` None: user-mode-linux, or QEMU with
    `SLOWER` times the timeout if that does not boot; `progress` gets a message about it.
    Raises: GuestHung; GuestPanicked; GateError if no kernel is available.
    """
    run_in = partial(
        _run,
        argv,
        env=env,
        cwd=cwd,
        results=results,
        on_output=on_output,
        terminal=terminal,
        memory=memory,
    )
    if kernel is not None:
        return run_in(kernel=kernel, timeout=timeout)
    try:
        return run_in(kernel=fetch(progress=progress), timeout=timeout)
    except GuestError as error:
        if error.booted:
            raise
        progress(f"{error}")
        progress(error.evidence)
        progress("trying QEMU, which is slower")
        try:
            return run_in(kernel=debian.fetch(progress=progress), timeout=timeout * SLOWER)
        except GuestError as second:
            if second.booted:
                raise
            raise _no_guest(error, second) from second
        except GateError as second:
            raise _no_guest(error, second) from second


def _no_guest(first: GuestError, second: GateError) -> GuestError:
    """Return the error for a machine on which neither kind of guest boots."""
    evidence = (str(first), first.evidence, f"QEMU instead: {second}", second.evidence)
    hint = second.hint
    if second.hint != first.hint:
        hint = f"for QEMU: {second.hint}. Otherwise: {first.hint}"
    return GuestError(
        "no test kernel boots on this machine",
        hint=hint,
        output=first.output,
        evidence="\n".join(filter(None, evidence)),
        booted=False,
    )


def _run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: Path | None,
    timeout: float,
    results: Path | None,
    on_output: OnOutput,
    terminal: bool,
    memory: int,
    kernel: Kernel,
) -> GuestResult:
    began = time.monotonic()
    with exit_on_sigterm(), _folder() as work:
        keep = (results or work / "results").absolute()
        keep.mkdir(parents=True, exist_ok=True)
        variables = {**(os.environ if env is None else env), "IPSECGATE_RESULTS": str(keep)}
        _links(work / "dev")
        command = command_file(argv, variables, cwd or Path.cwd())
        (work / "command").write_bytes(os.fsencode(command))
        (work / "settings").write_text(settings_file(kernel, keep, terminal))
        machine = (
            Qemu(kernel, work, memory, keep, on_output)
            if isinstance(kernel, debian.DebianKernel)
            else Uml(kernel, work, memory, on_output)
        )
        with machine as guest:
            guest.follow(timeout)
        seconds = time.monotonic() - began
        return GuestResult(guest.exit_code(), guest.output.text, _files(results), seconds)


def command_file(argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> str:
    """Return the shell script that runs `argv` with exactly `env` in `cwd`.

    Raises: ValueError if `argv` is empty or its first word contains "=", because env(1) would
    read it as a variable.
    """
    if not argv or "=" in argv[0]:
        raise ValueError(f"not a command: {list(argv)}")
    words = ["exec", "env", "-i", *(f"{name}={value}" for name, value in env.items()), *argv]
    return f"cd {shlex.quote(str(cwd))} || exit 126\n{shlex.join(words)}\n"


def settings_file(kernel: Kernel, results: Path, terminal: bool) -> str:
    """Return the shell assignments that guest-init.sh reads."""
    size = shutil.get_terminal_size()
    settings = {
        "modules": str(kernel.modules.parent),
        "release": kernel.release,
        "results": str(results),
        "terminal": "yes" if terminal else "no",
        "rows": str(size.lines),
        "columns": str(size.columns),
    }
    return assignments(settings)


def assignments(variables: Mapping[str, str]) -> str:
    """Return shell assignments, one per line."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())


@contextmanager
def _folder() -> Iterator[Path]:
    """Make the guest's folder, in /tmp: the guest hides /dev/shm, and blanks are not allowed."""
    folder = Path(tempfile.mkdtemp(prefix="ipsecgate-guest-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _links(folder: Path) -> None:
    """Make the symbolic links that devtmpfs lacks. Source: proc(5), pts(4)."""
    folder.mkdir()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        (folder / name).symlink_to(f"/proc/self/fd/{number}")
    (folder / "fd").symlink_to("/proc/self/fd")
    (folder / "ptmx").symlink_to("pts/ptmx")


def _files(results: Path | None) -> tuple[Path, ...]:
    if results is None:
        return ()
    return tuple(sorted(path for path in results.absolute().rglob("*") if path.is_file()))


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _report_progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")


KINDS = {"uml": fetch, "qemu": debian.fetch}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command on a kernel that fits: in a room on this one, else (or --always) in a guest."""
    parser = argparse.ArgumentParser(prog="python -m ipsecgate.lab.guest", description=main.__doc__)
    parser.add_argument("--always", action="store_true", help="use a guest even if this one fits")
    parser.add_argument("--kernel", choices=KINDS, help="use this kind of guest and no other")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds (600)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--memory", type=int, default=MEMORY, metavar="MIB", help="(2048)")
    parser.add_argument("command", nargs="+", metavar="CMD")
    options = parser.parse_args(arguments)
    try:
        if options.kernel is None and not options.always and missing_feature() is None:
            return room.run(options.command, options.timeout, options.results)
        return run(
            options.command,
            timeout=options.timeout,
            results=options.results,
            on_output=_say,
            terminal=sys.stdout.isatty(),
            memory=options.memory,
            kernel=KINDS[options.kernel](progress=_report_progress) if options.kernel else None,
            progress=_report_progress,
        ).exit_code
    except GateError as error:
        _report_progress(error.report())
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
