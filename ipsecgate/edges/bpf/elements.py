"""The elements of a map: look up, update, delete, walk.

Every function raises OSError with the operation in its text. Keys and values are bytes of the map's
sizes.
"""

from __future__ import annotations

import ctypes as ct
import errno
import time
from collections.abc import Iterator

from ipsecgate.edges.bpf import libbpf

_ANY = 0  # BPF_ANY
_BATCH = 512  # elements
# Seconds to wait for memory, one after the other.
PAUSES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Return a map's value for a key, None if it has none. Raises: OSError."""
    value = ct.create_string_buffer(value_size)
    try:
        libbpf.call("look up", "bpf_map_lookup_elem", fd, key, value)
    except FileNotFoundError:
        return None
    return value.raw


def update(fd: int, key: bytes, value: bytes) -> None:
    """Set a map's value for a key. Raises: OSError (E2BIG, ENOSPC: the map is full).

    The kernel keeps some memory for new elements ready for each processor, and makes more a moment
    after it is used up (kernel/bpf/memalloc.c). Until then it returns ENOMEM, so try again.
    """
    for pause in (*PAUSES, None):
        try:
            libbpf.call("update map", "bpf_map_update_elem", fd, key, value, ct.c_uint64(_ANY))
        except OSError as error:
            if error.errno != errno.ENOMEM or pause is None:
                raise
            time.sleep(pause)
        else:
            return


def delete(fd: int, key: bytes) -> None:
    """Delete a map's entry if it exists. Raises: OSError."""
    try:
        libbpf.call("delete from map", "bpf_map_delete_elem", fd, key)
    except FileNotFoundError:
        return


def items(fd: int, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a hash or array map, many with each system call.

    Elements that are added or deleted meanwhile may be missing. Raises: OSError.
    """
    keys, values = (ct.create_string_buffer(_BATCH * size) for size in (key_size, value_size))
    place, previous, last = ct.create_string_buffer(max(4, key_size)), None, False
    while not last:
        count = ct.c_uint32(_BATCH)
        try:
            libbpf.call(
                "read map",
                "bpf_map_lookup_batch", fd, previous, place, keys, values, ct.byref(count), None,
            )  # fmt: skip
        except FileNotFoundError:
            last = True
        for number in range(count.value):
            yield (
                keys.raw[number * key_size : (number + 1) * key_size],
                values.raw[number * value_size : (number + 1) * value_size],
            )
        previous = place.raw


def keys(fd: int, key_size: int) -> Iterator[bytes]:
    """Yield a map's keys.

    While iterating, delete only keys that were yielded before the current one: without its
    previous key, the kernel starts again from the first. Raises: OSError.
    """
    key = ct.create_string_buffer(key_size)
    previous: bytes | None = None
    while True:
        try:
            libbpf.call("walk map", "bpf_map_get_next_key", fd, previous, key)
        except FileNotFoundError:
            return
        previous = key.raw
        yield previous
