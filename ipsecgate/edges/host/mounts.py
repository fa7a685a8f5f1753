"""Which file system is mounted where: proc_pid_mountinfo(5)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def mounted() -> Iterator[tuple[Path, str]]:
    """Yield every mount point and its type; a later mount hides an earlier one."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        yield Path(fields[4]), fields[fields.index("-") + 1]


def type_of(path: Path) -> str:
    """Return the type of the file system that a path is on, "" if unknown."""
    deepest, kind = Path(), ""
    for point, found in mounted():
        if path.is_relative_to(point) and len(point.parts) >= len(deepest.parts):
            deepest, kind = point, found
    return kind
