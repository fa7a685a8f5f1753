"""A netlink socket is read in slices, and survives lost datagrams: the kernel's own sockets."""

from __future__ import annotations

import errno
import socket
from functools import partial

import pytest

from ipsecgate.core.codec.netlink import messages
from ipsecgate.core.codec.rtnetlink import encode_link_get, encode_route_dump
from ipsecgate.edges.kernel import netlink
from ipsecgate.edges.kernel.netlink import RawNetlinkSocket, Requests

ROUTES = 0
ANSWERS = 2  # the loopback interface, and an acknowledgement


async def test_a_dump_is_read_to_its_end_whatever_the_slice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    for slice_ in (60.0, 0.0):
        monkeypatch.setattr(netlink, "SLICE", slice_)
        async with Requests(ROUTES) as requests:
            found = await requests.dump(partial(encode_route_dump, socket.AF_INET), messages)
        sizes.append(len(found))
    assert sizes[0] == sizes[1] > 0


async def test_reading_pauses_after_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[bytes] = []
    made = RawNetlinkSocket(ROUTES, got.append, lambda error: pytest.fail(str(error)))
    made.join(())
    try:
        monkeypatch.setattr(netlink, "SLICE", -1.0)
        for number in range(1, 4):
            made.send(encode_link_get(1, number))
        assert not made.drain()
        assert len(got) == 1
        monkeypatch.setattr(netlink, "SLICE", 60.0)
        assert made.drain()
        assert len(got) == 3 * ANSWERS
    finally:
        made.close()
    assert made.drain(), "there is nothing to read from a closed one"


async def test_lost_datagrams_are_reported_and_the_socket_goes_on() -> None:
    got: list[bytes] = []
    errors: list[OSError] = []
    made = RawNetlinkSocket(ROUTES, got.append, errors.append)
    made.join((), receive_buffer=8192)
    try:
        for number in range(1, 200):
            made.send(encode_link_get(1, number))
        made.drain()
        assert errors[0].errno == errno.ENOBUFS
        made.drain()
        got.clear()
        made.send(encode_link_get(1, 999))
        made.drain()
        assert len(got) == ANSWERS
    finally:
        made.close()
