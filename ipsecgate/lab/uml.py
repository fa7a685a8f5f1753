"""User-mode-linux as a process: start it, follow its two output streams, leave nothing behind.

Rules of this module: a guest is one process group, in its own pid namespace if the caller may
create one. Only SIGKILL ends it. `guest` decides what runs inside.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import NoReturn, Self, TypedDict

from ipsecgate.errors import GateError
from ipsecgate.lab import xstate
from ipsecgate.lab.console import PANIC, OnOutput, Output, ignore, last_lines
from ipsecgate.lab.kernel import Kernel

ROOT = Path(__file__).with_name("uml-root.sh")
INIT = Path(__file__).with_name("guest-init.sh")
MEMORY = 2048
"""Memory of a guest in MiB. Its pages are a sparse file that is unlinked while in use."""
FAST = "initcall_blacklist=raid6_select_algo pty.legacy_count=0 zswap.enabled=0"
"""Turns off features that cost 1.2 s of a boot and are not used here."""
TAIL = 4000
"""How many characters of each stream an error carries."""
PANIC_TIMEOUT = 5.0
"""Seconds that a kernel may take to exit after a panic, during which it prints the reason."""
IDLE = 0.1
"""Seconds after which an unfinished line is passed on."""

NO_BOOT = (
    "the console's last line shows which step failed. `make demo` and `make test` need no guest on"
    " a kernel that has ESP and IPv6, such as Debian's"
)


class _Facts(TypedDict):
    """The arguments common to every GuestError."""

    output: str
    evidence: str
    booted: bool


class GuestError(GateError):
    """The guest did not run the command to its end.

    `output`: the end of the command's output and of the console. `evidence`: the console's last
    lines. `booted`: whether the command had begun.
    """

    exit_code = 125

    def __init__(
        self, message: str, *, hint: str, output: str = "", evidence: str = "", booted: bool = True
    ) -> None:
        super().__init__(message, hint=hint, evidence=evidence)
        self.output = output
        self.booted = booted


class GuestHung(GuestError):  # noqa: N818
    """The guest was killed at the timeout, or because it did not boot in time."""

    exit_code = 124


class GuestPanicked(GuestError):  # noqa: N818
    """The guest's kernel panicked, or stopped before the command ended."""


class Uml:
    """A running user-mode-linux, killed when the `with` block ends.

    `work` is a folder on the host. It must contain `settings`, as `guest.settings_file` writes
    them, and gets `init`, the guest's process 1: uml-root.sh, followed by the script `init`, which
    writes `booted` and `exit-code` there. The guest's /dev/tty1 goes to `on_output`; its console is
    kept for errors. `memory`: MiB.
    Raises: GuestError if it needs a library that cannot be built (see `xstate`).
    """

    kind = "user-mode-linux"
    boot_limit = 120.0
    """Seconds until the command begins: 3 on a quiet machine."""

    def __init__(
        self,
        kernel: Kernel,
        work: Path,
        memory: int,
        on_output: OnOutput,
        *,
        init: Path = INIT,
    ) -> None:
        (work / "init").write_bytes(ROOT.read_bytes() + init.read_bytes())
        try:
            variables = xstate.environment()
        except GateError as error:
            raise GuestError(str(error), hint=error.hint, booted=False) from error
        variables["TMPDIR"] = str(memory_folder(memory, work))
        words = partial(kernel_arguments, kernel, work, memory)
        self._start(kernel, work, on_output, words, variables)

    def _start(
        self,
        kernel: Kernel,
        work: Path,
        on_output: OnOutput,
        words: Callable[[int], list[str]],
        variables: Mapping[str, str],
    ) -> None:
        """Start the process; `words` returns its command line, given the fd for the output."""
        self.output = Output(on_output)
        self._console = Output(ignore)
        self._work = work
        self._name = f"{self.kind} {kernel.release}"
        self._reader, writer = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*_leash(), *words(writer)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                env={"PATH": "/usr/bin:/bin", **variables},
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            os.close(self._reader)
            raise
        finally:
            os.close(writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_reason: object) -> None:
        self.kill()

    def follow(self, timeout: float) -> None:
        """Pass output on until the guest powers off.

        Raises: GuestHung after `timeout` seconds, or if it does not boot; GuestPanicked.
        """
        assert self._process.stdout is not None  # noqa: S101
        began = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ, self.output)
            selector.register(self._process.stdout, selectors.EVENT_READ, self._console)
            while selector.get_map():
                spent = time.monotonic() - began
                if spent > min(timeout, self.boot_limit) and (spent > timeout or not self.booted()):
                    self._hung(min(timeout, spent))
                ready = selector.select(min(max(timeout - spent, 0), IDLE))
                if not ready:
                    self.output.flush()
                for key, _events in ready:
                    data = os.read(key.fd, 1 << 16)
                    key.data.feed(data)
                    if not data:
                        selector.unregister(key.fileobj)
                if PANIC in self._console.text:
                    self._read_rest()
                    self._panicked("panicked")
        self.output.flush()

    def _read_rest(self) -> None:
        """Read the output from before the panic, and the rest of the panic message."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PANIC_TIMEOUT)
        assert self._process.stdout is not None  # noqa: S101
        for fd, output in (
            (self._reader, self.output),
            (self._process.stdout.fileno(), self._console),
        ):
            os.set_blocking(fd, False)
            with suppress(BlockingIOError):
                while data := os.read(fd, 1 << 16):
                    output.feed(data)

    def exit_code(self) -> int:
        """Return the command's exit code. Raises: GuestPanicked if there is none."""
        try:
            return int((self._work / "exit-code").read_text())
        except (OSError, ValueError):
            self._panicked("stopped")

    def booted(self) -> bool:
        """Return whether the guest has started its command."""
        return (self._work / "booted").exists()

    def kill(self) -> None:
        """Kill every process of the guest, wait for it, close the streams.

        With a leash, kill the namespace's process 1 first: the others die with it, and unshare(1)
        reaps it. Otherwise the host's process 1 would have to reap them, which may take long.
        """
        if _leash():
            for child in children_of(self._process.pid):
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._reader)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _hung(self, seconds: float) -> NoReturn:
        if self.booted():
            message = f"the guest ({self._name}) was killed after {seconds:.0f} s"
            hint = "if the command only needs more time, raise the timeout"
        else:
            message = (
                f"the guest ({self._name}) did not boot within {seconds:.0f} s, and was killed"
            )
            hint = NO_BOOT
        raise GuestHung(message, hint=hint, **self._facts())

    def _panicked(self, happened: str) -> NoReturn:
        """Raise GuestPanicked; `happened` is "panicked" or "stopped"."""
        if self.booted():
            when = "while its command ran"
            hint = "run it again; if it happens again, report it with these lines"
        else:
            when = "before its command began"
            hint = NO_BOOT
        raise GuestPanicked(
            f"the guest ({self._name}) {happened} {when}", hint=hint, **self._facts()
        )

    def _facts(self) -> _Facts:
        tail = self.output.text[-TAIL:] + self._console.text[-TAIL:]
        return {
            "output": tail,
            "evidence": last_lines(self._name, self._console.text),
            "booted": self.booted(),
        }


def kernel_arguments(kernel: Kernel, work: Path, memory: int, output: int) -> list[str]:
    """Return the kernel's command line. `memory`: MiB. `output`: the fd for /dev/tty1.

    Source: the kernel's Documentation/virt/uml/user_mode_linux_howto_v2.rst.
    """
    return [
        str(kernel.binary),
        *f"mem={memory}M root=/dev/root rootfstype=hostfs rootflags=/ ro {FAST}".split(),
        *f"panic=-1 con=null con0=null,fd:1 con1=null,fd:{output}".split(),
        *f"uml_dir={work} umid=uml init=/bin/sh -- {work}/init {work}".split(),
    ]


def memory_folder(memory: int, otherwise: Path) -> Path:
    """Return the folder for the guest's `memory` MiB: /dev/shm if large enough and not noexec."""
    shm = Path("/dev/shm")  # noqa: S108
    with suppress(OSError):
        stat = os.statvfs(shm)
        roomy = stat.f_bavail * stat.f_frsize > memory << 20
        if roomy and not stat.f_flag & os.ST_NOEXEC and os.access(shm, os.W_OK):
            return shm
    return otherwise


def children_of(pid: int) -> list[int]:
    """Return the children of a process's main thread; an empty list if it is gone."""
    with suppress(FileNotFoundError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@cache
def _leash() -> tuple[str, ...]:
    """Return the command prefix that makes the guest die with us, however we die.

    A pid namespace ends all of user-mode-linux's processes together. The kernel must not be process
    1 of that namespace, or a panic hangs: hence the shell. Empty if namespaces are not allowed.
    """
    prefix = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child=KILL")
    try:
        probe = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return ()
    return (*prefix, "sh", "-c", '"$@"; exit $?', "sh") if probe.returncode == 0 else ()
