"""A BPF ring buffer's consumer, over libbpf.

Source: ring_buffer__consume() in libbpf.h.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
from collections.abc import Callable

from ipsecgate.edges.bpf import libbpf

RECORDS_PER_CALL = 256  # records that one `consume` reads at most


class Ring:
    """A consumer of one ring; `fd` becomes readable when records are there."""

    def __init__(self, map_fd: int, on_record: Callable[[bytes], None]) -> None:
        """Raises: OSError."""
        self._failure: Exception | None = None
        self._left = RECORDS_PER_CALL

        def callback(_ctx: int, data: int, size: int) -> int:
            try:
                on_record(ct.string_at(data, size))
            except Exception as error:  # consume() raises it: ctypes would print it and go on
                self._failure = error
                return -1
            self._left -= 1
            return 0 if self._left else -errno.ECANCELED  # libbpf still counts the record as read

        self._callback = libbpf.RingCallback(callback)  # C has a pointer to it: keep it alive
        self._ring = libbpf.library().ring_buffer__new(map_fd, self._callback, None, None)
        if not self._ring:
            raise OSError(ct.get_errno(), f"open ring buffer: {os.strerror(ct.get_errno())}")
        self.fd = libbpf.call("ring buffer", "ring_buffer__epoll_fd", self._ring)

    def consume(self) -> int:
        """Pass waiting records to the callback; return how many: at most `RECORDS_PER_CALL`.

        The limit gives the event loop a turn during a flood; `fd` stays readable.
        Raises: OSError; whatever the callback raised, and then the record that it got is lost.
        """
        self._left = RECORDS_PER_CALL
        try:
            return libbpf.call("read ring buffer", "ring_buffer__consume", self._ring)
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
            return RECORDS_PER_CALL
        finally:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure

    def close(self) -> None:
        """Release the consumer; the map itself stays."""
        if self._ring:
            libbpf.library().ring_buffer__free(self._ring)
            self._ring = None
