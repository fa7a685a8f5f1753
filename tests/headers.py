"""Read the kernel headers that linux-libc-dev installs."""

from __future__ import annotations

import re
from pathlib import Path

INCLUDE = Path("/usr/include")
# aarch64 uses the asm-generic numbers, which every machine's headers contain.
UNISTD = {
    "x86_64": "x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "asm-generic/unistd.h",
}


def system_calls(machine: str) -> dict[str, int] | None:
    """Return a machine's system call numbers by name; None if its headers are not installed."""
    path = INCLUDE / UNISTD[machine]
    if not path.is_file():
        return None
    found = re.findall(r"^#define __NR_(\w+)\s+(\d+)$", path.read_text(), re.MULTILINE)
    return {name: int(number) for name, number in found}
