"""VICI packets written by the `vici` package from PyPI and parsed by ours, strictly."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from vici.protocol import Message

from ipsecgate.core.codec.vici_sections import ViciError
from ipsecgate.core.codec.vici_wire import DEPTH, Answer, parse
from ipsecgate.edges.strongswan.vici import refusal

TREE: dict[str, Any] = {
    "gw": {"local_addrs": ["192.0.2.1", ""], "children": {"net": {"mode": "TUNNEL"}, "x": {}}},
    "Ω": "Ω",
    "none": [],
}
READ = {
    "gw": {"local_addrs": [b"192.0.2.1", b""], "children": {"net": {"mode": b"TUNNEL"}, "x": {}}},
    "Ω": "Ω".encode(),
    "none": [],
}
BODY: bytes = Message.serialize(TREE)
VALUE = b"\3\1a\0\1x"


def test_a_packet_written_by_the_vici_library_is_parsed() -> None:
    assert parse(b"\1" + BODY) == Answer(1, None, READ)
    assert parse(b"\7\7list-sa" + BODY) == Answer(7, "list-sa", READ)
    assert parse(b"\5") == Answer(5, None, {})


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\0",  # a request: no daemon asks
        b"\x08",
        b"\7\7list",
        b"\1\0",
        b"\1\7" + VALUE[1:],
        b"\1\2",  # an end of nothing
        b"\1\1\1a",
        b"\1\4\1a\5\0\1x",
        b"\1\4\1a\3\6",
        b"\1" + VALUE + VALUE,
        b"\1\1\1a\2\1\1a\2",
        b"\1\3\1\xff\0\0",
        b"\1" + b"\1\1a" * (DEPTH + 1) + b"\2" * (DEPTH + 1),
    ],
    ids=repr,
)
def test_a_malformed_packet_is_an_error(packet: bytes) -> None:
    """Skipping an unknown element, or keeping one of two, would lose a part of the message."""
    with pytest.raises(ViciError, match="before byte"):
        parse(packet)


def test_a_truncated_packet_is_an_error() -> None:
    """Cut between two of its elements, a packet is a valid shorter one."""
    head = b"\7\7list-sa"
    elements = [Message.serialize({key: value}) for key, value in TREE.items()]
    between = [len(head) + len(b"".join(elements[:n])) for n in range(len(elements))]
    parsed = []
    for length in range(len(head + BODY)):
        with suppress(ViciError):
            parse((head + BODY)[:length])
            parsed.append(length)
    assert parsed == between


@pytest.mark.parametrize("reason", [[b"x"], {"x": b""}, None])
def test_a_refusal_without_a_message_is_still_a_refusal(reason: Any) -> None:
    assert refusal({"success": b"no", "errmsg": reason}) == "no reason given"
    assert refusal({"success": [b"yes"]}) == "no reason given"
    assert refusal({"success": b"no", "errmsg": b"why"}) == "why"
