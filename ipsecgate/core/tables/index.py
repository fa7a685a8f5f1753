"""What the hooks' index says: which masks have entries for a flow's destination (bpf/gate.h)."""

from __future__ import annotations

from typing import NamedTuple

from ipsecgate.core.tables.layout import LEVELS_V4, MARK_BITS, MASK_BITS, Key, mix

_ADDRESS_BITS = 128
_LOW = (1 << 64) - 1


class Mark(NamedTuple):
    """What the index must say of an entry: where the hash points, a slot has these bits."""

    hash: int
    slot: int


def level_of(mask: Key) -> int:
    """Return how many whole bytes of the destination a mask contains, 0 to 16."""
    wild: int = ~mask.daddr & (1 << _ADDRESS_BITS) - 1
    return (_ADDRESS_BITS - wild.bit_length()) // 8


def level_bits(level: int, family: int) -> int:
    """Return the bits of a level in GATE_LEVELS, for one family; 0: for both."""
    return (family != 4) << level | (family != 6) << level + LEVELS_V4


def prefix_of(daddr: int, level: int) -> int:
    """Return the first bytes of a destination, the others 0, as a number of 128 bits."""
    rest = _ADDRESS_BITS - 8 * level
    return daddr >> rest << rest


def prefix_hash(daddr: int, level: int, table: int) -> int:
    """Return the hash of a destination's prefix, as next_level() in bpf/search.bpf.c does."""
    prefix = prefix_of(daddr, level)
    return mix(mix(prefix >> 64, table << 8 | level), prefix & _LOW)


def mask_slot(number: int, key_hash: int) -> int:
    """Return the slot of a mask that has this one entry."""
    return number | 1 << MASK_BITS + ((key_hash >> 32) * MARK_BITS >> 32)


def mark(table: int, number: int, level: int, daddr: int, key_hash: int) -> Mark:
    """Return what the index must say of an entry, by its mask, destination and key."""
    return Mark(prefix_hash(daddr, level, table), mask_slot(number, key_hash))
