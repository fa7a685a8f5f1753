"""The tables of slots find every entry, and say when they need more space."""

from __future__ import annotations

from random import Random

import pytest

from ipsecgate.core.tables.index import Mark, level_bits, level_of
from ipsecgate.core.tables.layout import GONE, LEVELS_V4, MASKS, PROBES, Key
from ipsecgate.core.tables.slots import SMALLEST, CrowdedError, Slots, bits_for

WIDTH = 4


def made(bits: int = SMALLEST) -> tuple[Slots, list[bytes]]:
    """Return empty tables of equal size, and the list that their entries' keys are in."""
    keys: list[bytes] = []
    memory = memoryview(bytearray(2 * WIDTH << bits)).cast("I")
    return Slots(memory, (bits, bits), keys.__getitem__), keys


def put(slots: Slots, keys: list[bytes], hash_: int, key: bytes) -> int | None:
    keys.append(key)
    return slots.put(hash_, key, len(keys) - 1)


def places_of(slots: Slots) -> list[tuple[int, int]]:
    return [one for part in slots.places() for one in part]


def hashes(count: int, seed: int = 1) -> list[int]:
    random = Random(seed)
    return [random.getrandbits(64) for _ in range(count)]


def test_every_entry_is_found_while_others_come_and_go() -> None:
    slots, keys = made()
    there: dict[bytes, tuple[int, int]] = {}
    random = Random(2)
    for number, hash_ in enumerate(hashes(3000)):
        key = number.to_bytes(4)
        assert put(slots, keys, hash_, key) is None
        there[key] = hash_, number
        if len(there) > 300:
            gone = random.choice(list(there))
            assert slots.remove(there[gone][0], gone) == there.pop(gone)[1]
            assert slots.find(hash_, gone) is None
        if number % 500 == 0:
            assert all(slots.find(h, key) == n for key, (h, n) in there.items())
    assert {number for _, number in places_of(slots)} == {n for _, n in there.values()}


def test_a_new_entry_takes_the_place_of_the_one_with_its_key() -> None:
    slots, keys = made()
    assert put(slots, keys, 7, b"same") is None
    assert put(slots, keys, 7, b"other") is None
    assert put(slots, keys, 7, b"same") == 0
    assert (slots.find(7, b"same"), slots.find(7, b"other")) == (2, 1)


def test_a_place_of_a_gone_entry_does_not_end_the_search_and_is_used_again() -> None:
    slots, keys = made()
    for key in (b"a", b"b", b"c"):
        put(slots, keys, 0, key)
    assert slots.remove(0, b"b") == 1
    assert slots.find(0, b"c") == 2
    put(slots, keys, 0, b"d")
    assert [place for place, _ in places_of(slots)] == [0, 1, 2]
    assert slots.remove(0, b"nothing") is None


def test_a_place_is_never_further_than_the_hooks_go() -> None:
    slots, keys = made()
    for number in range(PROBES):
        put(slots, keys, 0, bytes([number]))
    with pytest.raises(CrowdedError):
        put(slots, keys, 0, b"one more")
    assert put(slots, keys, 0, bytes([3])) == 3, "but a key that is there"
    slots.remove(0, bytes([9]))
    assert put(slots, keys, 0, b"one more") is None


def test_tables_wrap_around_at_their_end() -> None:
    slots, keys = made()
    last = GONE << 32 | GONE
    for key in (b"a", b"b"):
        put(slots, keys, last, key)
    assert sorted(place for place, _ in places_of(slots)) == [0, (1 << SMALLEST) - 1]
    for number in (1, 2):
        slots.mark(Mark(last, number | 1 << 12))
    assert [slot % MASKS for slot in slots.masks_at(last)] == [1, 2]


def test_the_index_has_one_slot_for_a_mask_with_the_bits_of_all_its_entries() -> None:
    slots, _ = made()
    for bit in (12, 13, 31):
        slots.mark(Mark(5 << 60, 9 | 1 << bit))
    slots.mark(Mark(5 << 60, 10 | 1 << 12))
    assert list(slots.masks_at(5 << 60)) == [9 | 1 << 12 | 1 << 13 | 1 << 31, 10 | 1 << 12]
    assert list(slots.masks_at(6 << 60)) == []


@pytest.mark.parametrize("count", [0, 1, 255, 256, 1000, 100_000])
def test_tables_have_space_for_what_they_were_made_for(count: int) -> None:
    bits = bits_for(count)
    assert count * 4 <= 1 << bits
    assert bits == SMALLEST or count * 8 > 1 << bits
    slots, keys = made(bits)
    assert not slots.is_full((count, count))
    assert slots.is_full((1 << bits, 0))
    for number, hash_ in enumerate(hashes(min(count, 20_000))):
        put(slots, keys, hash_, number.to_bytes(4))
    assert slots.is_full((0, 1 << bits))


def test_a_level_is_the_whole_bytes_of_the_destination_that_a_mask_contains() -> None:
    full = (1 << 128) - 1
    for bits, level in ((0, 0), (7, 0), (8, 1), (15, 1), (96, 12), (104, 13), (127, 15), (128, 16)):
        assert level_of(Key(daddr=full >> 128 - bits << 128 - bits, family=0xFF)) == level
    assert level_of(Key(daddr=full ^ 1 << 100)) == 3, "a hole ends it"
    assert level_bits(3, 6) == 1 << 3
    assert level_bits(13, 4) == 1 << 13 + LEVELS_V4
    assert level_bits(0, 0) == 1 | 1 << LEVELS_V4
