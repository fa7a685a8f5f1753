"""The filter has the bit of every entry, and is made again before it is too full to be of use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from ipsecgate.core.tables.layout import FILTER_WORDS
from ipsecgate.edges.bpf.filter import Filter


class Mapped:
    """A filter over a file, searched as the hooks do."""

    def __init__(self, path: Path) -> None:
        self.setting = 0
        self._file = path.open("w+b")
        self._file.truncate(2 * FILTER_WORDS * 8)
        self.filter = Filter(self._file.fileno(), 0, self._use)
        self.used = 0

    def _use(self, setting: int) -> None:
        self.setting = setting
        self.used += 1

    def has(self, one: int) -> bool:
        """Search as `try_mask` of bpf/maps.bpf.c does."""
        bit = one >> (self.setting >> 1)
        self._file.seek(((self.setting & 1) * FILTER_WORDS + (bit >> 6)) * 8)
        return bool(int.from_bytes(self._file.read(8), "little") >> (bit & 63) & 1)

    def close(self) -> None:
        self.filter.close()
        self._file.close()


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[Mapped]:
    made = Mapped(tmp_path / "filter")
    yield made
    made.close()


def hashes(count: int, seed: int = 1) -> list[int]:
    random = Random(seed)
    return [random.getrandbits(64) for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 1000, 100_000])
def test_every_entry_has_its_bit_and_few_others_do(mapped: Mapped, count: int) -> None:
    mapped.filter.fill(hashes(count), count)
    assert all(mapped.has(one) for one in hashes(count))
    strangers = hashes(2000, seed=2)
    assert sum(mapped.has(one) for one in strangers) < len(strangers) // 16


def test_entries_are_added_until_it_is_full(mapped: Mapped) -> None:
    assert mapped.filter.is_full(1), "nothing is known of a filter that nobody made"
    mapped.filter.fill(hashes(100), 100)
    more = hashes(1000, seed=3)
    added = 0
    while not mapped.filter.is_full(10):
        mapped.filter.add(more[added : added + 10])
        added += 10
    assert 100 <= added < 1000, "room for as many more"
    assert all(mapped.has(one) for one in (*hashes(100), *more[:added]))


def test_it_is_made_again_beside_the_one_in_use(mapped: Mapped) -> None:
    mapped.filter.fill(hashes(100), 100)
    first = mapped.setting
    mapped.filter.fill(hashes(5000, seed=4), 5000)
    assert mapped.setting & 1 != first & 1
    assert mapped.setting >> 1 < first >> 1, "more bits of the hash count"
    assert all(mapped.has(one) for one in hashes(5000, seed=4))
    assert mapped.used == 2
