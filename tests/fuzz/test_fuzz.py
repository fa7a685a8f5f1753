"""Fuzzing in short, and that it finds what is there; `make fuzz` is the long form."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.fuzz.engine import ACCEPTED, REAL, FoundError, Target, run
from tests.fuzz.targets import TARGETS

INPUTS = int(os.environ.get("FUZZ_INPUTS", "3000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: str(kind.name))
def test_no_input_breaks_a_decoder(kind: Callable[[], Target]) -> None:
    target = kind()
    try:
        report = run(target, INPUTS, SEED)
    finally:
        target.close()
    print(report)
    assert sum(report.outcomes.values()) == INPUTS
    assert INPUTS // REAL <= report.outcomes[ACCEPTED] < INPUTS, "both kinds were fed"


class Planted(Target):
    """A decoder of one number, with a defect or without."""

    name = "planted"
    refusals = (ValueError,)

    def __init__(self, decode: Callable[[bytes], Any]) -> None:
        self.decode = decode
        self.touched = 0

    def real(self, random: Random) -> tuple[bytes, Any]:
        number = random.randrange(256)
        return bytes([number]), number

    def feed(self, data: bytes) -> Any:
        if len(data) != 1:
            raise ValueError("not one byte")
        return self.decode(data)

    def state(self) -> object:
        return self.touched


def test_a_decoder_without_a_defect_passes() -> None:
    assert run(Planted(lambda data: data[0]), 2000, 1).outcomes.keys() == {ACCEPTED, "ValueError"}


def test_each_kind_of_defect_is_found() -> None:
    def crash(data: bytes) -> int:
        return data[0] if data[0] != 77 else data[1]

    def wrong(data: bytes) -> int:
        return data[0] & 0x7F

    def refuse(data: bytes) -> int:
        raise ValueError("a real message")

    for decode, said in ((crash, "raised IndexError"), (wrong, "made"), (refuse, "what is real")):
        with pytest.raises(FoundError, match=said) as caught:
            run(Planted(decode), 5000, 1)
        assert f"--hex {caught.value.data.hex()}" in str(caught.value)

    def change(data: bytes) -> int:
        target.touched += 1
        return data[0]

    target = Planted(change)
    with pytest.raises(FoundError, match="changed state"):
        run(target, 10, 1)
