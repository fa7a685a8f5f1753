"""One typed wrapper per libbpf function that the gate needs, over the system's libbpf.so.1.

Every wrapper raises OSError with the operation in its text; the caller owns a returned file
descriptor. We use libbpf rather than bcc because it costs a process 1 MiB and needs no compiler.

Source: libbpf 1.x bpf.h; bpf(2).
"""

from __future__ import annotations

import ctypes as ct
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ipsecgate.core.model.value import value
from ipsecgate.errors import KernelLacksError

PROG_TYPE_CGROUP_SKB = 8
PROG_TYPE_CGROUP_SOCK_ADDR = 18
MAP_TYPE_ARRAY = 2
MAP_TYPE_SK_STORAGE = 24
INSN_SIZE = 8
MAPS_PER_PROGRAM = 64
SEARCH_SIZE = 128  # sizeof(struct search), bpf/search.bpf.c


class _MapCreateOpts(ct.Structure):
    _fields_ = [
        ("sz", ct.c_size_t),
        ("btf_fd", ct.c_uint32),
        ("btf_key_type_id", ct.c_uint32),
        ("btf_value_type_id", ct.c_uint32),
        ("btf_vmlinux_value_type_id", ct.c_uint32),
        ("inner_map_fd", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("map_extra", ct.c_uint64),
        ("numa_node", ct.c_uint32),
        ("map_ifindex", ct.c_uint32),
    ]


class _ProgLoadOpts(ct.Structure):
    _fields_ = [
        ("sz", ct.c_size_t),
        ("attempts", ct.c_int),
        ("expected_attach_type", ct.c_int),
        ("prog_btf_fd", ct.c_uint32),
        ("prog_flags", ct.c_uint32),
        ("prog_ifindex", ct.c_uint32),
        ("kern_version", ct.c_uint32),
        ("attach_btf_id", ct.c_uint32),
        ("attach_prog_fd", ct.c_uint32),
        ("attach_btf_obj_fd", ct.c_uint32),
        ("fd_array", ct.c_void_p),
        ("func_info", ct.c_void_p),
        ("func_info_cnt", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32),
        ("line_info", ct.c_void_p),
        ("line_info_cnt", ct.c_uint32),
        ("line_info_rec_size", ct.c_uint32),
        ("log_level", ct.c_uint32),
        ("log_size", ct.c_uint32),
        ("log_buf", ct.c_char_p),
    ]


class _MapInfo(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("name", ct.c_char * 16),
    ]


class _ProgInfo(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("tag", ct.c_ubyte * 8),
        ("lengths", ct.c_uint32 * 2),
        ("instructions", ct.c_uint64 * 2),
        ("load_time", ct.c_uint64),
        ("created_by_uid", ct.c_uint32),
        ("nr_map_ids", ct.c_uint32),
        ("map_ids", ct.c_uint64),
        ("name", ct.c_char * 16),
    ]


class _LinkInfo(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("cgroup_id", ct.c_uint64),
        ("attach_type", ct.c_uint32),
    ]


@value
class MapShape:
    """A map's type and sizes, in bytes: a version reuses a pinned map only if these are equal.

    `inner` is unknown of a map that is read from the kernel.
    """

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0
    inner: MapShape | None = None  # of a map of maps: the maps in it, at first


@value
class LinkInfo:
    """A cgroup link: the program that it runs now, and its cgroup's inode number."""

    prog_id: int
    cgroup_id: int
    attach_type: int


RingCallback = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)


@cache
def library() -> ct.CDLL:
    """Return libbpf. Raises: KernelLacksError."""
    try:
        found = ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise KernelLacksError(
            "libbpf.so.1 is not installed", hint="apt install libbpf1"
        ) from error
    found.libbpf_set_print(None)
    found.ring_buffer__new.restype = ct.c_void_p
    found.ring_buffer__new.argtypes = [ct.c_int, RingCallback, ct.c_void_p, ct.c_void_p]
    for name in ("ring_buffer__consume", "ring_buffer__epoll_fd", "ring_buffer__free"):
        getattr(found, name).argtypes = [ct.c_void_p]
    return found


def call(operation: str, function: str, *args: object) -> int:
    """Call a libbpf function that returns -errno. Raises: OSError, with the operation's name."""
    result = int(getattr(library(), function)(*args))
    if result < 0:
        # libbpf 1.x returns -errno; C's errno may be stale.
        raise OSError(-result, f"{operation}: {os.strerror(-result)}")
    return result


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Close a descriptor when the block ends."""
    try:
        yield fd
    finally:
        os.close(fd)


def create_map(name: str, shape: MapShape, model: int = 0) -> int:
    """Create a map; `model`: of a map of maps, one such as will be in it. Raises: OSError."""
    opts = _MapCreateOpts(map_flags=shape.flags, inner_map_fd=model)
    opts.sz = ct.sizeof(opts)
    btf = None
    if shape.type == MAP_TYPE_SK_STORAGE:
        btf = _load_btf(shape.value_size)
        opts.btf_fd, opts.btf_key_type_id, opts.btf_value_type_id = btf, 1, 2
    try:
        return _create_map(name, shape, opts)
    finally:
        if btf is not None:
            os.close(btf)  # the map holds its own reference


def _load_btf(value_size: int) -> int:
    """Load the least type information that the kernel requires for socket storage.

    Type 1 is the key, an int; type 2 the value, a struct of that size without members.
    Source: linux/btf.h; bpf_local_storage_map_check_btf().
    """
    value = struct.pack("=III", 5, 4 << 24, value_size)  # BTF_KIND_STRUCT
    return _load_types(b"\0int\0value\0", value)


def _load_types(names: bytes, types: bytes) -> int:
    """Load type information: an int as type 1, then these. Source: linux/btf.h."""
    types = struct.pack("=IIII", 1, 1 << 24, 4, 32) + types  # BTF_KIND_INT, 32 bits
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    raw = header + types + names
    return call("load type information", "bpf_btf_load", raw, len(raw), None)


def _load_function_types() -> int:
    """Load the types of a hook and of the function that it calls.

    The verifier checks a global function once, not at each call, and takes its arguments' types
    from here. Source: linux/btf.h; btf_prepare_func_args().
    """
    names = b"\0int\0search\0hook\0function\0argument\0"
    at = {
        name: names.index(f"\0{name}\0".encode()) + 1
        for name in ("search", "hook", "function", "argument")
    }
    types = b"".join(
        struct.pack("=" + "I" * len(words), *words)
        for words in (
            (at["search"], 4 << 24, SEARCH_SIZE),  # 2: struct search
            (0, 2 << 24, 2),  # 3: a pointer to it
            (0, 13 << 24, 1),  # 4: int (void)
            (0, 13 << 24 | 1, 1, at["argument"], 3),  # 5: int (struct search *)
            (at["hook"], 12 << 24, 4),  # 6: static
            (at["function"], 12 << 24 | 1, 5),  # 7: global
        )
    )
    return _load_types(names, types)


def _create_map(name: str, shape: MapShape, opts: _MapCreateOpts) -> int:
    return call(
        f"create map {name}",
        "bpf_map_create",
        shape.type,
        name.encode(),
        shape.key_size,
        shape.value_size,
        shape.max_entries,
        ct.byref(opts),
    )


def load_program(
    name: str, insns: bytes, prog_type: int, attach_type: int, functions: Sequence[int] = ()
) -> int:
    """Load a program; `functions`: the first instruction of each function that it calls.

    A function takes a pointer to a struct search, `SEARCH_SIZE` bytes, and returns an int.
    Raises: OSError with the verifier's last lines.
    """
    log = ct.create_string_buffer(1 << 20)
    # The types are those that `_load_function_types` has.
    info = struct.pack("=II", 0, 6) + b"".join(struct.pack("=II", at, 7) for at in functions)

    def attempt(log_level: int, btf: int) -> int:
        opts = _ProgLoadOpts(expected_attach_type=attach_type, log_level=log_level)
        opts.sz = ct.sizeof(opts)
        if functions:
            opts.prog_btf_fd = btf
            opts.func_info = ct.cast(ct.c_char_p(info), ct.c_void_p)
            opts.func_info_cnt, opts.func_info_rec_size = 1 + len(functions), 8
        if log_level:
            opts.log_buf = ct.cast(log, ct.c_char_p)
            opts.log_size = len(log)
        return call(
            f"load program {name}",
            "bpf_prog_load",
            prog_type,
            name.encode(),
            b"GPL",
            insns,
            len(insns) // INSN_SIZE,
            ct.byref(opts),
        )

    with closing_fd(_load_function_types()) as btf:
        try:
            return attempt(0, btf)
        except OSError as first:
            # Load again for the verifier's log, which takes time to write.
            try:
                return attempt(1, btf)
            except OSError:
                lines = log.value.decode(errors="replace").strip().splitlines()[-8:]
                raise OSError(first.errno, "\n".join([str(first.strerror), *lines])) from None


def create_link(prog_fd: int, cgroup_fd: int, attach_type: int) -> int:
    """Attach a program to a cgroup, in addition to any other programs. Raises: OSError."""
    return call("attach", "bpf_link_create", prog_fd, cgroup_fd, attach_type, None)


def update_link(link_fd: int, prog_fd: int) -> None:
    """Replace a link's program atomically. Raises: OSError."""
    call("replace the program of a link", "bpf_link_update", link_fd, prog_fd, None)


def detach_link(link_fd: int) -> None:
    """Detach a link's program from its cgroup now, while other references to the link exist.

    Raises: OSError.
    """
    call("detach a link", "bpf_link_detach", link_fd)


def pin(fd: int, path: Path) -> None:
    """Pin an object in bpffs. Raises: OSError."""
    call(f"pin {path}", "bpf_obj_pin", fd, os.fsencode(path))


def open_pin(path: Path) -> int:
    """Open a pinned object. Raises: OSError."""
    return call(f"open {path}", "bpf_obj_get", os.fsencode(path))


def _info(fd: int, into: ct.Structure) -> None:
    call(
        "read object info",
        "bpf_obj_get_info_by_fd",
        fd,
        ct.byref(into),
        ct.byref(ct.c_uint32(ct.sizeof(into))),
    )


def map_shape(fd: int) -> MapShape:
    """Return a map's shape. Raises: OSError."""
    info = _MapInfo()
    _info(fd, info)
    return MapShape(info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)


def map_id(fd: int) -> int:
    """Return a map's id. Raises: OSError."""
    info = _MapInfo()
    _info(fd, info)
    return int(info.id)


def program_info(fd: int) -> tuple[str, set[int]]:
    """Return a program's name, and the ids of the maps that it uses. Raises: OSError."""
    ids = (ct.c_uint32 * MAPS_PER_PROGRAM)()
    info = _ProgInfo(nr_map_ids=MAPS_PER_PROGRAM, map_ids=ct.addressof(ids))
    _info(fd, info)
    return info.name.decode(errors="replace"), set(ids[: min(info.nr_map_ids, MAPS_PER_PROGRAM)])


def link_info(fd: int) -> LinkInfo:
    """Return a cgroup link's program and cgroup. Raises: OSError."""
    info = _LinkInfo()
    _info(fd, info)
    return LinkInfo(info.prog_id, info.cgroup_id, info.attach_type)


def possible_cpus() -> int:
    """Return how many values a per-CPU map has for each key. Raises: OSError."""
    return call("count CPUs", "libbpf_num_possible_cpus")
