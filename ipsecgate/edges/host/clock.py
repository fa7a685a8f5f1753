"""The state of the machine's clocks, without changing them."""

from __future__ import annotations

import ctypes as ct
from contextlib import suppress
from pathlib import Path

STA_UNSYNC = 0x40  # linux/timex.h
_STATUS = 40  # offset of `status` in struct timex on 64-bit machines
_RTC = Path("/sys/class/rtc/rtc0/since_epoch")
_ADJTIME = Path("/etc/adjtime")

_libc = ct.CDLL(None, use_errno=True)


def is_synchronised() -> bool | None:
    """Return whether something keeps the wall clock right, None if the kernel does not say.

    Source: adjtimex(2); with `modes` 0 it only reads.
    """
    timex = ct.create_string_buffer(512)
    if _libc.adjtimex(timex) < 0:
        return None
    status = ct.c_int.from_buffer(timex, _STATUS).value
    return not status & STA_UNSYNC


def hardware_clock() -> float | None:
    """Return its time in seconds since the epoch; None if there is none, or it keeps local time."""
    with suppress(OSError):
        if "LOCAL" in _ADJTIME.read_text().split():
            return None
    with suppress(OSError, ValueError):
        return float(_RTC.read_text())
    return None
