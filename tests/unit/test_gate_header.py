"""bpf/gate.h and its Python mirror have the same constants, enum members and structure offsets.

The header is parsed as text, so this runs without a compiler. tests/system/test_layout.py compares
the sizes with those that the compiler computes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from enum import IntEnum, IntFlag

import pytest

from ipsecgate.core.tables import layout, packed
from ipsecgate.edges.bpf import bytecode, libbpf

HEADER = (bytecode.source_dir() / "gate.h").read_text()
SEARCH = (bytecode.source_dir() / "search.bpf.c").read_text()
DEFINES = {
    name: int(value.rstrip("UL"), 0)
    for name, value in re.findall(r"^#define GATE_(\w+)\s+(\d\w*)", HEADER, re.MULTILINE)
}
TYPES = {"__u8": 1, "__u16": 2, "__u32": 4, "__u64": 8, "char": 1, "int": 4}
MIRRORED = (
    *(
        "LAYOUT",
        "MASKS",
        "ENTRIES",
        "ROUTES",
        "TUNNELS",
        "OTHERS",
        "LINE",
        "MASK_BITS",
        "MARK_BITS",
        "PLACE_BITS",
    ),
    *("PROBES", "GONE", "LEVELS_V4"),
)
ENUMS: tuple[type[IntEnum | IntFlag], ...] = (
    layout.TableId,
    layout.State,
    layout.Setting,
    layout.Reason,
    layout.PathFlag,
)
COUNTS = {"TABLES": layout.TableId, "SETTINGS": layout.Setting, "COUNTERS": layout.Reason}
# The header names the first of two consecutive words: published + table.
PAIRS = ("PUBLISHED", "LEVELS")
# Constants of the hooks alone: map sizes, a socket's memory, and which hook reports an event.
HOOKS_ONLY = {
    *(
        "RECENT",
        "REPLACED",
        "RING_PAGES",
        "KEY_WORDS",
        "EVENT_INTERVAL_NS",
        "COVERED",
        "CLEAR",
        "DAEMON",
        "OTHER",
    ),
    *("CONNECT4", "CONNECT6", "SENDMSG4", "SENDMSG6", "EGRESS"),
}


def expected() -> dict[str, int]:
    """Return what the header must define, according to the mirror."""
    members = {str(member.name): int(member) for enum in ENUMS for member in enum}
    for name in PAIRS:
        pair = [members.pop(f"{table.name}_{name}") for table in layout.TableId]
        assert pair == [table + pair[0] for table in layout.TableId]
        members[name] = pair[0]
    constants = {name: getattr(layout, name) for name in MIRRORED}
    constants["ORIGIN_BITS"] = packed.ORIGIN_BITS
    return {**constants, **members, **{n: len(e) for n, e in COUNTS.items()}}


def test_every_constant_of_the_header_is_mirrored_by_name_and_value() -> None:
    assert {k: v for k, v in DEFINES.items() if k not in HOOKS_ONLY} == expected()


def test_no_two_enum_members_share_a_name() -> None:
    names = [member.name for enum in ENUMS for member in enum]
    assert len(names) == len(set(names))


def offsets(struct: str, source: str = HEADER) -> dict[str, int]:
    """Return the offsets of a structure's members, "" for its size; natural alignment.

    Of an anonymous union the first member counts.
    """
    body = re.search(rf"^struct {struct} {{\n(.*?)^}}", source, re.MULTILINE | re.DOTALL)
    assert body, struct
    union = r"^\tunion {\n\t\tstruct {\n(.*?)^\t\t};\n.*?^\t};\n"
    text = re.sub(union, lambda m: m[1].replace("\t\t\t", "\t"), body[1], flags=re.M | re.S)
    found, at, widest = {}, 0, 1
    for kind, nested, name, count in re.findall(
        r"^\t(?:(\w+)|struct (\w+)) (\w+)(?:\[(\w+)\])?;", text, re.MULTILINE
    ):
        size, alignment = (offsets(nested)[""], 8) if nested else (TYPES[kind], TYPES[kind])
        at = -(-at // alignment) * alignment
        found[name] = at
        times = DEFINES[count[5:]] if count.startswith("GATE_") else int(count or 1)
        at, widest = at + size * times, max(widest, alignment)
    return {**found, "": -(-at // widest) * widest}


@pytest.mark.parametrize(
    ("struct", "size"),
    [
        ("gate_key", layout.KEY_SIZE),
        ("gate_mask", packed.MASK_SIZE),
        ("gate_entry", packed.ENTRY_SIZE),
        ("gate_route", packed.ROUTE_SIZE),
        ("gate_path", packed.PATH_SIZE),
        ("gate_event", packed.EVENT_SIZE),
    ],
)
def test_sizes(struct: str, size: int) -> None:
    assert offsets(struct)[""] == size


def test_the_verifier_is_given_the_size_of_the_search() -> None:
    search = offsets("search", SEARCH)
    assert search["flow"] == 0
    assert search["generation"] == layout.KEY_SIZE
    assert search[""] == libbpf.SEARCH_SIZE


def numbered(struct: str, members: dict[str, tuple[int, bytes]]) -> bytes:
    """Return a structure with these members; the value of each is (its size, its bytes)."""
    at = offsets(struct)
    raw = bytearray(at[""])
    for name, (size, value) in members.items():
        raw[at[name] : at[name] + size] = value.ljust(size, b"\0")
    return bytes(raw)


def host(value: int, size: int = 4) -> tuple[int, bytes]:
    return size, layout.INDEX.pack(value) if size == 4 else layout.SETTING.pack(value)


KEY = layout.pack_key(layout.Key(saddr=1, daddr=2, family=6), 1, 3)


def test_an_entry_has_its_members_where_the_header_puts_them() -> None:
    entry = layout.Entry(layout.State.LIVE, error=13, id=7, deadline=5, rank=9)
    raw = numbered(
        "gate_answer",
        {
            "rank": host(9, 8),
            "state": host(layout.State.LIVE),
            "error": host(13),
            "id": host(7),
            "deadline": host(5 * layout.NS, 8),
        },
    )
    assert packed.pack_answer(entry) == raw
    assert packed.unpack_answer(raw) == entry
    before = packed.pack_answer(layout.Entry(layout.State.DEAD))
    whole = numbered(
        "gate_entry",
        {
            "key": (len(KEY), KEY),
            "hash": host(layout.key_hash(KEY), 8),
            "since": host(4, 8),
            "now": (len(raw), raw),
            "before": (len(before), before),
        },
    )
    written = packed.pack_entry(KEY, 4, raw, before)
    assert without_checks(written) == whole
    assert packed.unpack_entry(whole, 4) == raw
    assert packed.unpack_entry(whole, 3) == before
    assert packed.key_of_entry(whole) == KEY
    assert packed.hash_of_entry(whole) == layout.key_hash(KEY)
    assert (packed.is_pending(whole, 4), packed.is_pending(whole, 3)) == (False, True)


CHECKS = (offsets("gate_entry")["before"] - 4, offsets("gate_entry")[""] - 4)


def without_checks(entry: bytes) -> bytes:
    """Return a struct gate_entry whose two `check` members, last in their answers, are 0."""
    raw = bytearray(entry)
    for at in CHECKS:
        raw[at : at + 4] = bytes(4)
    return bytes(raw)


def test_an_answer_counts_only_in_its_own_entry() -> None:
    """The hooks compare `check`; each of these differs in one thing that it must depend on."""
    other = bytes([KEY[0] ^ 1]) + KEY[1:]
    answer = layout.Entry(layout.State.LIVE, error=13, id=7, deadline=5, rank=9)
    changed = (
        replace(answer, error=1),
        replace(answer, id=8),
        replace(answer, deadline=6),
        replace(answer, rank=8),
        replace(answer, state=layout.State.DEAD),
    )
    checks = {
        packed.pack_entry(key, since, packed.pack_answer(entry))[CHECKS[0] :][:4]
        for key, since, entry in (
            (KEY, 4, answer), (KEY, 5, answer), (other, 4, answer),
            *((KEY, 4, entry) for entry in changed),
        )
    }  # fmt: skip
    assert len(checks) == 3 + len(changed)


def test_an_event_has_its_members_where_the_header_puts_them() -> None:
    key = layout.Key(saddr=1, daddr=2, sport=3, dport=4, proto=6, family=6, mark=5)
    raw = numbered(
        "gate_event",
        {
            "ns": host(1, 8),
            "cgroup": host(11, 8),
            "flow": (layout.KEY_SIZE, layout.pack_key(key)),
            "reason": host(layout.Reason.REFUSE_NETNS),
            "policy": host(12),
            "pid": host(13),
            "hook": host(14),
            "untold": host(15),
            "comm": (16, b"curl"),
        },
    )
    event = packed.unpack_event(raw)
    assert layout.flow_key(event.flow) == key
    assert (event.reason, event.policy) == (layout.Reason.REFUSE_NETNS, 12)
    assert (event.pid, event.comm, event.cgroup) == (13, "curl", 11)
    assert (event.at, event.untold) == (1e-9, 15)
