"""Another tool's program on a cgroup, beside which the kernel allows no other.

The kernel refuses to attach a program (EPERM, as to any user who is not root) if the cgroup, or
the nearest cgroup above it that has programs, has one that was attached without BPF_F_ALLOW_MULTI.
If the one above has BPF_F_ALLOW_OVERRIDE, it attaches ours, and the other program no longer runs
for the cgroup below. Programs further up run for all cgroups below them, if they allow others.

Source: hierarchy_allows_attach(), compute_effective_progs() and __cgroup_bpf_attach() in Linux's
kernel/bpf/cgroup.c; each case tried.
"""

from __future__ import annotations

import ctypes as ct
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from ipsecgate.edges.bpf import libbpf
from ipsecgate.errors import GateError

ALLOW_OVERRIDE, ALLOW_MULTI = 1 << 0, 1 << 1  # BPF_F_ALLOW_OVERRIDE, BPF_F_ALLOW_MULTI: linux/bpf.h
PROGRAMS = 64  # a cgroup holds no more of one kind: BPF_CGROUP_MAX_PROGS


class ExclusiveProgramError(GateError):
    """A cgroup cannot be gated because of another tool's program."""


def explain(cgroup: Path, hook: str, attach_type: int) -> ExclusiveProgramError | None:
    """Return why a hook cannot be attached to a cgroup, None if no program is the reason.

    Raises: OSError.
    """
    path, flags, programs = _nearest(cgroup, attach_type)
    if not programs or flags & ALLOW_MULTI or (path != cgroup and flags & ALLOW_OVERRIDE):
        return None
    above = next((one for one in _above(path) if _is_free(one, attach_type)), None)
    way_out = (
        f"or gate {above}, whose hooks run for all cgroups below it"
        if above is not None
        else "or remove that program: no cgroup above it can be gated instead"
    )
    return ExclusiveProgramError(
        f"{path} has {_described(programs)} at {hook}, attached so that the kernel allows no other "
        "program",
        hint=f"see `bpftool cgroup show {path} effective`; have that tool attach with "
        f"BPF_F_ALLOW_MULTI (`multi` in bpftool), {way_out}",
    )


def replaced(cgroup: Path, attach_type: int) -> str:
    """Return which programs above a cgroup don't run for it if it has a hook, "" if there are none.

    Raises: OSError.
    """
    for path in _above(cgroup):
        flags, programs = _query(path, attach_type)
        if programs:
            return f"{_described(programs)} of {path}" if flags & ALLOW_OVERRIDE else ""
    return ""


def _nearest(cgroup: Path, attach_type: int) -> tuple[Path, int, list[int]]:
    """Return the nearest cgroup with programs, from this one upwards, their flags and ids."""
    for path in (cgroup, *_above(cgroup)):
        flags, programs = _query(path, attach_type)
        if programs:
            return path, flags, programs
    return cgroup, 0, []


def _is_free(cgroup: Path, attach_type: int) -> bool:
    path, flags, programs = _nearest(cgroup, attach_type)
    return not programs or bool(
        flags & (ALLOW_MULTI if path == cgroup else ALLOW_MULTI | ALLOW_OVERRIDE)
    )


def _above(cgroup: Path) -> Iterator[Path]:
    """Yield the cgroups above one, up to the root of the hierarchy."""
    return takewhile(lambda path: (path / "cgroup.controllers").is_file(), cgroup.parents)


def programs(cgroup: Path, attach_type: int) -> list[int]:
    """Return the ids of the programs of a cgroup itself, as they run. Raises: OSError."""
    return _query(cgroup, attach_type)[1]


def describe(ident: int) -> str:
    """Return a program's id, and its name if we may see it."""
    return _describe(ident)


def _query(cgroup: Path, attach_type: int) -> tuple[int, list[int]]:
    """Return the attach flags and program ids of a cgroup itself."""
    flags, count = ct.c_uint32(), ct.c_uint32(PROGRAMS)
    ids = (ct.c_uint32 * PROGRAMS)()
    with libbpf.closing_fd(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        libbpf.call(
            f"read the programs of {cgroup}",
            "bpf_prog_query", fd, attach_type, 0, ct.byref(flags), ids, ct.byref(count),
        )  # fmt: skip
    return flags.value, list(ids[: count.value])


def _described(programs: list[int]) -> str:
    return " and ".join(map(_describe, programs))


def _describe(ident: int) -> str:
    """Return a program's id, and its name if we may see it: that needs CAP_SYS_ADMIN."""
    name = ""
    with suppress(PermissionError):
        fd = libbpf.call("open a program", "bpf_prog_get_fd_by_id", ident)
        with libbpf.closing_fd(fd):
            name, _maps = libbpf.program_info(fd)
    return f"BPF program {ident}" + (f" ({name})" if name else "")
