"""Decoders with one planted defect each, which fuzzing must find, and one without."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.fuzz.engine import Target

REAL = b"GOOD"


class Sound(Target):
    """Accepts one message, and refuses all others."""

    name = "sound"
    refusals = (ValueError,)

    def real(self, random: Random) -> tuple[bytes, Any]:
        return REAL, len(REAL)

    def damaged(self, random: Random) -> bytes:
        return random.randbytes(4)

    def feed(self, data: bytes) -> Any:
        if data != REAL:
            raise ValueError("not the message")
        return len(REAL)


class Crashes(Sound):
    """Crashes after three right bytes, which only coverage reveals one by one."""

    name = "crashes"

    def feed(self, data: bytes) -> Any:
        if data[:1] == b"B":
            if data[1:2] == b"A":
                if data[2:3] == b"D":
                    return data[99]
                raise ValueError("nearly")
            raise ValueError("not quite")
        return super().feed(data)


class Mistaken(Sound):
    name = "mistaken"

    def feed(self, data: bytes) -> Any:
        return super().feed(data) - 1


class Strict(Sound):
    name = "strict"

    def feed(self, data: bytes) -> Any:
        raise ValueError("never")


class Touched(Sound):
    name = "touched"

    def __init__(self) -> None:
        self._fed = 0

    def feed(self, data: bytes) -> Any:
        self._fed += 1
        return super().feed(data)

    def state(self) -> object:
        return self._fed
