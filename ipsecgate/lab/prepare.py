"""Prepare a kernel for the tests and the demo; `make setup` runs this.

python -m ipsecgate.lab.prepare --packages      print the packages to install first, one per line
python -m ipsecgate.lab.prepare [--kernel qemu] download the test kernel and boot it once
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from collections.abc import Sequence

from ipsecgate.errors import GateError
from ipsecgate.lab import debian, guest, xstate
from ipsecgate.lab.guest import KINDS
from ipsecgate.lab.kernel import MACHINES, missing_feature


def packages(kind: str) -> list[str]:
    """Return the Debian packages that this kind of test kernel needs and this machine lacks."""
    if missing_feature() is None or platform.machine() not in MACHINES:
        return []
    if kind == "qemu":
        return [] if shutil.which(debian.QEMU) else ["qemu-system-x86"]
    return ["tcc"] if xstate.needed() and xstate.compiler() is None else []


def boot(kind: str) -> str:
    """Boot the test kernel once and return a line for the user.

    Raises: GuestError if it does not boot; GateError if no kernel is available.
    """
    missing = missing_feature()
    if missing is None:
        return f"Linux {platform.release()} has ESP and IPv6: no test kernel is needed"
    if platform.machine() not in MACHINES:
        return (
            f"this kernel has no {missing}, and Debian has no user-mode-linux for"
            f" {platform.machine()}: boot a kernel with ESP and IPv6, such as Debian's own, for the"
            " demo and the tests"
        )
    kernel = KINDS[kind](progress=_say)
    seconds = guest.run(["true"], kernel=kernel).seconds
    remedy = " and a library for this CPU" if kind == "uml" and xstate.needed() else ""
    return (
        f"this kernel has no {missing}: tests run in {kernel.binary}{remedy}"
        f" (it booted in {seconds:.1f} s)"
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m ipsecgate.lab.prepare")
    parser.add_argument("--packages", action="store_true", help="only print what is missing")
    parser.add_argument("--kernel", choices=KINDS, default="uml")
    options = parser.parse_args(arguments)
    try:
        if options.packages:
            sys.stdout.writelines(f"{name}\n" for name in packages(options.kernel))
        else:
            sys.stdout.write(f"{boot(options.kernel)}\n")
    except GateError as error:
        sys.stderr.write(f"{error.report()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
