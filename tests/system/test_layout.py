"""The hooks as compiled: types as in their Python mirror, and few enough calls for the verifier."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.core.tables import layout, packed
from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.bpf.compiler import layout as compiled_layout
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.store import SLOT

SIZES = {"unsigned int": 4, "unsigned short": 2, "unsigned char": 1, "unsigned long long": 8,
         "int": 4, "char": 1}  # fmt: skip


def size(kind: Any) -> int:
    if isinstance(kind, str):
        return SIZES[kind]
    _name, members, *_ = kind
    total = 0
    for _member, member, *count in members:
        total += size(member) * (count[0][0] if count else 1)
    return total


@pytest.fixture(scope="module")
def described(monkeypatch_module: pytest.MonkeyPatch) -> Mapping[str, tuple[Any, Any]]:
    monkeypatch_module.setenv("BCC_KERNEL_SOURCE", str(bytecode.source_dir()))
    layouts = compiled_layout(bytecode.source_dir())
    return {name: (json.loads(key), json.loads(leaf)) for name, (key, leaf) in layouts.items()}


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_sizes_agree(described: Mapping[str, tuple[Any, Any]], cache: Path) -> None:
    assert size(described["recent"][0]) == layout.KEY_SIZE
    assert size(described["masks"][1]) == packed.MASK_SIZE
    assert size(described["paths"][0]) == packed.ROUTE_SIZE
    assert size(described["paths"][1]) == packed.PATH_SIZE
    shapes = bytecode.get(cache).maps
    entries, slots = shapes["entries"].inner, shapes["slots"].inner
    assert entries is not None
    assert slots is not None
    assert entries.value_size == packed.ENTRY_SIZE
    assert slots.value_size == layout.LINE * SLOT
    assert shapes["masks"].max_entries == len(layout.TableId) * layout.MASKS
    assert shapes["settings"].max_entries == len(layout.Setting)
    assert shapes["counters"].max_entries == layout.COUNTERS


def test_key_fields_are_at_the_offsets_that_python_uses(
    described: Mapping[str, tuple[Any, Any]],
) -> None:
    at = {}
    offset = 0
    for name, kind, *count in described["recent"][0][1]:
        at[name] = offset
        offset += SIZES[kind] * (count[0][0] if count else 1)
    raw = layout.pack_key(layout.Key(1, 2, 0x0304, 0x0506, 7, 8, 0xB), table=9, mask_number=10)
    assert raw[at["saddr"] : at["saddr"] + 16] == (1).to_bytes(16)
    assert raw[at["daddr"] : at["daddr"] + 16] == (2).to_bytes(16)
    assert raw[at["sport"] : at["sport"] + 2] == b"\x03\x04"
    assert raw[at["dport"] : at["dport"] + 2] == b"\x05\x06"
    assert [raw[at[f]] for f in ("proto", "family", "table")] == [7, 8, 9]
    assert int.from_bytes(raw[at["mark"] : at["mark"] + 4]) == 0xB
    assert int.from_bytes(raw[at["mask_number"] : at["mask_number"] + 2]) == 10
    assert layout.unpack_key(raw) == (9, 10, layout.Key(1, 2, 0x0304, 0x0506, 7, 8, 0xB))


def test_a_malformed_event_is_an_error() -> None:
    with pytest.raises(layout.LayoutError, match="event of 3 bytes"):
        packed.unpack_event(b"abc")
    with pytest.raises(layout.LayoutError, match="address family 0"):
        packed.unpack_event(bytes(packed.EVENT_SIZE))


CALL, OF_A_FUNCTION = 0x85, 1  # BPF_JMP | BPF_CALL, BPF_PSEUDO_CALL: linux/bpf.h
CALLS = 10_000  # as many follows the "liveness analysis" of Linux 7.3, each anew for its caller


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_makes_no_more_calls_than_the_verifier_follows(hook: str, cache: Path) -> None:
    program = bytecode.get(cache).programs[hook]
    starts = (0, *program.functions)
    calls: dict[int, list[int]] = {start: [] for start in starts}
    for at, (code, registers, _offset, to) in enumerate(struct.iter_unpack("=BBhi", program.insns)):
        if (code, registers >> 4) == (CALL, OF_A_FUNCTION):
            calls[max(start for start in starts if start <= at)].append(at + 1 + to)

    def followed(start: int) -> int:
        return 1 + sum(count * followed(to) for to, count in Counter(calls[start]).items())

    assert len(program.functions) < followed(0) < CALLS // 2
