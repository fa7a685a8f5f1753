"""Feed a decoder what outside may send: real messages, damaged ones, and noise.

Rules of this module: a real message must be decoded as what it means; a damaged one is decoded
or refused with an error that the decoder documents; whatever it was, the target's state is the
same afterwards, and the answer comes soon. Anything else is a finding. A run is a function of
target and seed. Damage that makes a decoder answer in a new way is kept and damaged further.
"""

from __future__ import annotations

import time
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any

REAL = 8  # of so many inputs one is a real message
KEPT = 256
SLOW = 2.0  # seconds of processor time for one input
ACCEPTED = "accepted"

_INTERESTING = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000,
                0xFFFFFFFF)  # fmt: skip


class Target:
    """A decoder under test; each input is fed on its own."""

    name: str
    refusals: tuple[type[Exception], ...] = ()
    words: tuple[bytes, ...] = ()  # that mean something to the decoder
    shaped = False  # `damaged` is damaged enough, every other time

    def real(self, random: Random) -> tuple[bytes, Any]:
        """Return a message as the other side would send it, and what it means."""
        raise NotImplementedError

    def damaged(self, random: Random) -> bytes:
        """Return a message that is well-formed in a way, to be damaged further."""
        return self.real(random)[0]

    def feed(self, data: bytes) -> Any:
        """Decode, and do what follows from it. Raises: `refusals`."""
        raise NotImplementedError

    def state(self) -> object:
        """Return what no input may change."""
        return None

    def close(self) -> None:
        """Give back what the target holds."""


class FoundError(Exception):
    """An input that breaks a rule."""

    def __init__(self, target: Target, data: bytes, what: str) -> None:
        super().__init__(
            f"{target.name}: {what}\n  input: {data.hex()}\n"
            f"  again: .venv/bin/python -m tests.fuzz --target {target.name} --hex {data.hex()}"
        )
        self.data = data


@dataclass
class Report:
    """What a run came to: inputs by outcome."""

    target: str
    seed: int
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    ways: int = 0  # distinct answers

    def __str__(self) -> str:
        total = sum(self.outcomes.values())
        refused = ", ".join(
            f"{count} {name}" for name, count in self.outcomes.most_common() if name != ACCEPTED
        )
        return (
            f"{self.target:<12} {total:>8} inputs {self.outcomes[ACCEPTED]:>8} accepted "
            f"{self.seconds:>6.1f} s  seed {self.seed}  {self.ways} ways; refused: "
            f"{refused or 'none'}"
        )


def run(target: Target, inputs: int, seed: int) -> Report:
    """Feed that many inputs. Raises: FoundError at the first that breaks a rule."""
    random = Random(f"{seed} {target.name}")
    report = Report(target.name, seed)
    kept: list[bytes] = []
    ways: set[str] = set()
    before = target.state()
    began = time.monotonic()
    for number in range(inputs):
        meaning: list[Any] = []
        if number % REAL == 0:
            data, *meaning = target.real(random)
        elif kept and random.random() < 0.4:
            data = damage(random, random.choice(kept), target.words)
        else:
            data = target.damaged(random)
            if not target.shaped or random.random() < 0.5:
                data = damage(random, data, target.words)
        way = judge(target, data, tuple(meaning), before)
        report.outcomes[way.split(" ", 1)[0]] += 1
        if way not in ways:
            ways.add(way)
            kept = [*kept[-KEPT + 1 :], data]
    report.seconds = time.monotonic() - began
    report.ways = len(ways)
    return report


def judge(target: Target, data: bytes, meaning: tuple[Any, ...], before: object) -> str:
    """Feed one input; return "accepted", or the refusal's class and the lines that it came by.

    Raises: FoundError.
    """
    began = time.process_time()
    try:
        got = target.feed(data)
    except target.refusals as error:
        way = f"{type(error).__name__} {_lines(error)}"
        if meaning:
            raise FoundError(target, data, f"refused what is real, {error}") from error
    except Exception as error:
        raise FoundError(target, data, f"raised {error!r:.500}") from error
    else:
        way = ACCEPTED
        if meaning and got != meaning[0]:
            raise FoundError(target, data, f"made {got!r}\n  of {meaning[0]!r}")
    if target.state() != before:
        raise FoundError(target, data, f"changed state, {way}")
    if (took := time.process_time() - began) > SLOW:
        raise FoundError(target, data, f"took {took:.1f} s, {way}")
    return way


def _lines(error: BaseException) -> str:
    lines = []
    cause: BaseException | None = error
    while cause is not None:
        frame = cause.__traceback__
        for _ in range(16):
            if frame is None:
                break
            lines.append(str(frame.tb_lineno))
            frame = frame.tb_next
        cause = cause.__cause__
    return "-".join(lines)


def twist(random: Random, tree: Any, others: tuple[Any, ...]) -> None:
    """Put something else into a tree of dicts and lists, or take something away."""
    while tree:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = random.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and random.random() < 0.9:
            tree = tree[key]
        elif random.random() < 0.15:
            del tree[key]
            return
        else:
            tree[key] = deepcopy(random.choice(others))
            return


def damage(random: Random, data: bytes, words: tuple[bytes, ...]) -> bytes:
    """Return bytes like these, but wrong in one way or several."""
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 2, 4, 8))):
        _damage(random, raw, words)
    return bytes(raw)


def _damage(random: Random, raw: bytearray, words: tuple[bytes, ...]) -> None:
    at = random.randrange(len(raw) + 1)
    end = min(len(raw), at + random.choice((1, 1, 2, 4, 8, 64)))
    match random.randrange(9):
        case 0 if at < len(raw):
            raw[at] ^= 1 << random.randrange(8)
        case 1 if at < len(raw):
            raw[at] = random.randrange(256)
        case 2 | 3:  # a number, at its own boundary
            size = random.choice((1, 2, 4))
            at -= at % size
            value = random.choice(_INTERESTING) & ((1 << 8 * size) - 1)
            raw[at : at + size] = value.to_bytes(size, random.choice(("big", "little")))
        case 4:
            del raw[at:end]
        case 5:
            raw[at:at] = raw[at:end]
        case 6:
            raw[at:at] = random.randbytes(end - at)
        case 7:
            word = random.choice(words) if words else random.randbytes(4)
            raw[at : at if random.random() < 0.5 else end] = word
        case _ if random.random() < 0.2:
            del raw[at:]
