"""What the hooks search: entries by masked key, each with a rank; the lowest rank wins.

Rules of this module:
- The hooks try every mask that may have a better rank than the best entry found so far
  (tuple-space search: Srinivasan, Suri, Varghese, "Packet Classification using Tuple Space
  Search", SIGCOMM 1999). With ranks in the entries, an entry is put in or taken out without
  any other being touched.
- A table never changes an answer: the entry that wins for a flow is the rule that wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Self

from ipsecgate.core.model.flow import EPHEMERAL, PORT_MASK, Network, Selector
from ipsecgate.core.model.value import value
from ipsecgate.core.tables.layout import IF_IDS, V4_MAPPED, Entry, Key

_ALL_ADDRESS = (1 << 128) - 1


@value
class Ternary:
    """A value and a mask: a flow matches if it equals the value in every bit of the mask."""

    value: Key
    mask: Key

    def matches(self, key: Key) -> bool:
        """Return whether a flow's key matches."""
        return key.masked(self.mask) == self.value

    def intersect(self, other: Self) -> Ternary | None:
        """Return what matches both, None where nothing does."""
        if not other.mask or self == other:
            return self
        if not self.mask:
            return other
        if (self.value ^ other.value) & self.mask & other.mask:
            return None
        return Ternary(self.value.joined(other.value), self.mask.joined(other.mask))


def ternary(
    dst: Network,
    *,
    src: Network | None = None,
    proto: int = 0,
    sport: tuple[int, int] = (0, 0),
    dport: tuple[int, int] = (0, 0),
    mark: tuple[int, int] = (0, 0),
    if_id: int | None = None,
) -> Ternary:
    """Return a ternary for one IP version.

    Ports and mark are (value, mask); `src` and `if_id` None are any.
    """
    version = dst.version
    mapped = V4_MAPPED if version == 4 else 0
    daddr = mapped | int(dst.network_address)
    saddr, length = 0, -1
    if src is not None:
        saddr, length = mapped | int(src.network_address), src.prefixlen
    return Ternary(
        Key(
            saddr,
            daddr,
            sport[0] & sport[1],
            dport[0] & dport[1],
            proto,
            version,
            mark[0],
            if_id or 0,
        ),
        _mask(
            version,
            length,
            dst.prefixlen,
            sport[1],
            dport[1],
            proto != 0,
            mark[1],
            if_id is not None,
        ),
    )


@lru_cache(maxsize=1 << 12)
def _mask(  # noqa: PLR0917  the fields of a key, in its order
    version: int, src: int, dst: int, sport: int, dport: int, proto: bool, mark: int, if_id: bool
) -> Key:
    """Return the mask for two prefix lengths, -1 for any address: many rules share one."""
    width = 32 if version == 4 else 128

    def bits(length: int) -> int:
        return _ALL_ADDRESS >> width - length << width - length if length >= 0 else 0

    protos, if_ids = 0xFF if proto else 0, IF_IDS if if_id else 0
    return Key(bits(src), bits(dst), sport, dport, protos, 0xFF, mark, if_ids)


def from_selector(
    selector: Selector, mark: tuple[int, int] = (0, 0), if_id: int | None = None
) -> Ternary:
    """Return an XFRM selector as a ternary, without its interface index."""
    return ternary(
        selector.dst,
        src=selector.src,
        proto=selector.proto,
        sport=(selector.sport, selector.sport_mask),
        dport=(selector.dport, selector.dport_mask),
        mark=mark,
        if_id=if_id,
    )


def port_masks(low: int, high: int) -> list[tuple[int, int]]:
    """Return the fewest aligned (value, mask) blocks that make up the inclusive range.

    Raises: ValueError if the range is empty or outside 0..65535.
    """
    if not 0 <= low <= high <= PORT_MASK:
        raise ValueError(f"port range {low}-{high}")
    blocks = []
    while low <= high:
        size = low & -low or PORT_MASK + 1
        while low + size - 1 > high:
            size >>= 1
        blocks.append((low, PORT_MASK & ~(size - 1)))
        low += size
    return blocks


@lru_cache(maxsize=1 << 12)
def may_be_chosen(value: int, mask: int) -> bool:
    """Return whether the port that the kernel chooses for an unbound socket may be in a block."""
    if mask == PORT_MASK:
        return value == 0 or value in EPHEMERAL
    return value == 0 or any(port & mask == value for port in EPHEMERAL)


@value
class Rule:
    """Flows that match get this entry, unless an entry of a lower rank has them."""

    match: Ternary
    entry: Entry


class Table:
    """Entries by mask and masked key, as the hooks search them: the lowest rank wins."""

    def __init__(self) -> None:
        self.rows: dict[Key, dict[Key, Entry]] = {}
        self.size = 0  # entries

    def copy(self) -> Table:
        """Return a table with the same entries."""
        made = Table()
        made.rows = {mask: row.copy() for mask, row in self.rows.items()}
        made.size = self.size
        return made

    def put(self, match: Ternary, entry: Entry | None) -> None:
        """Set what the flows of a ternary get; None removes it."""
        row = self.rows.setdefault(match.mask, {})
        self.size -= match.value in row
        if entry is not None:
            row[match.value] = entry
            self.size += 1
            return
        row.pop(match.value, None)
        if not row:
            del self.rows[match.mask]

    def get(self, match: Ternary) -> Entry | None:
        """Return what is set for exactly these flows."""
        return self.rows.get(match.mask, {}).get(match.value)

    def classify(self, key: Key) -> Entry | None:
        """Answer as the hook does, None where no entry matches."""
        best: Entry | None = None
        for mask, row in self.rows.items():
            entry = row.get(key.masked(mask))
            if entry is not None and (best is None or better(entry, best)):
                best = entry
        return best

    def entries(self) -> Iterator[tuple[Ternary, Entry]]:
        """Yield all entries."""
        return (
            (Ternary(value, mask), entry)
            for mask, row in self.rows.items()
            for value, entry in row.items()
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Table({dict(self.entries())!r})"


def better(one: Entry, other: Entry) -> bool:
    """Return whether one entry is taken rather than another: the lower rank, then the later end."""
    if one.rank != other.rank:
        return one.rank < other.rank
    return outlives(one.deadline, other.deadline)


def outlives(one: int, other: int) -> bool:
    """Return whether one deadline is later than another, as in bpf/maps.bpf.c; 0 is never."""
    return other != 0 and (one == 0 or one > other)


# --- from scratch: for tests, the oracle and the benchmarks ---------------------------------


def compile_table(rules: Iterable[Rule]) -> Table:
    """Return the table in which the first rule that matches a flow wins, in the order given."""
    table = Table()
    for rank, rule in enumerate(rules):
        if table.get(rule.match) is None:
            table.put(rule.match, replace(rule.entry, rank=rank))
    return table
