"""Another tool's program on a cgroup, beside which the kernel allows no other.

The kernel refuses to attach a program (EPERM, as to any user who is not root) if the cgroup, or the
nearest cgroup above it that has programs, has one that was attached without BPF_F_ALLOW_MULTI.

Source: hierarchy_allows_attach() and __cgroup_bpf_attach() in Linux's kernel/bpf/cgroup.c.
"""

from __future__ import annotations

import ctypes as ct
import os
from contextlib import suppress
from pathlib import Path

from ipsecgate.edges.bpf import libbpf
from ipsecgate.errors import GateError

ALLOW_MULTI = 1 << 1  # BPF_F_ALLOW_MULTI, linux/bpf.h
PROGRAMS = 64  # a cgroup holds no more of one kind: BPF_CGROUP_MAX_PROGS


class ExclusiveProgramError(GateError):
    """A cgroup cannot be gated because of another tool's program."""


def explain(cgroup: Path, hook: str, attach_type: int) -> ExclusiveProgramError | None:
    """Return why a hook cannot be attached to a cgroup, None if no program is the reason.

    Raises: OSError.
    """
    for path in (cgroup, *cgroup.parents):
        if not (path / "cgroup.controllers").is_file():
            return None  # above the root
        flags, programs = _query(path, attach_type)
        if programs:
            if flags & ALLOW_MULTI:
                return None
            described = " and ".join(map(_describe, programs))
            return ExclusiveProgramError(
                f"{path} has {described} at {hook}, attached so that the kernel allows no other "
                "program",
                hint=f"see `bpftool cgroup show {path} effective`; have that tool attach with "
                "BPF_F_ALLOW_MULTI (`multi` in bpftool), or gate a cgroup above it",
            )
    return None


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


def _describe(ident: int) -> str:
    """Return a program's id, and its name if we may see it: that needs CAP_SYS_ADMIN."""
    name = ""
    with suppress(PermissionError):
        fd = libbpf.call("open a program", "bpf_prog_get_fd_by_id", ident)
        with libbpf.closing_fd(fd):
            name, _maps = libbpf.program_info(fd)
    return f"BPF program {ident}" + (f" ({name})" if name else "")
