"""CHILD_SAs that send and receive nothing, judged by the kernel's counts."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.codec.xfrm import packets_of_sas
from ipsecgate.core.model.ipsec import ChildSa, SaId
from ipsecgate.core.state.silence import ENOUGH, silent_children
from tests.unit.transcript import FLOW, LISTED, LOCAL, NAME, PEER
from tests.unit.xfrm_bytes import ALL, NEWSA, OUT, message, state

INBOUND = SaId(LOCAL, LISTED.spi_in, LISTED.proto)
OUTBOUND = LISTED.outbound


def texts(packets: dict[SaId, int], *children: ChildSa) -> list[str]:
    return [str(one) for one in silent_children(children or (LISTED,), packets)]


def test_packets_that_leave_and_none_that_come_back() -> None:
    (found,) = silent_children([LISTED], {OUTBOUND: ENOUGH, INBOUND: 0})
    assert (
        found.problem.text
        == f"child {NAME}: {ENOUGH} packets left as ESP to {PEER}, and none came back"
    )
    assert found.carries(FLOW)
    assert not found.carries(replace(FLOW, daddr=ip_address("198.51.100.1")))


def test_one_answer_or_too_few_packets_are_no_silence() -> None:
    assert texts({OUTBOUND: 1000, INBOUND: 1}) == []
    assert texts({OUTBOUND: ENOUGH - 1, INBOUND: 0}) == []
    assert texts({}) == []


def test_an_inbound_state_that_is_not_known_is_no_silence() -> None:
    assert texts({OUTBOUND: ENOUGH}) == []
    assert texts({OUTBOUND: ENOUGH}, replace(LISTED, local_host=None)) == []


def test_after_a_rekeying_both_generations_count() -> None:
    new = replace(LISTED, spi_in=0x77, spi_out=0x88, unique=2)
    fresh = {SaId(LOCAL, 0x77, LISTED.proto): 0, SaId(PEER, 0x88, LISTED.proto): ENOUGH}
    assert texts({OUTBOUND: 9, INBOUND: 8, **fresh}, LISTED, new) == []
    assert len(texts({OUTBOUND: 9, INBOUND: 0, **fresh}, LISTED, new)) == 1


def test_the_kernels_counts_are_decoded() -> None:
    v6 = state("2001:db8::1", "2001:db8::2", 1)
    counts = dict(packets_of_sas(ALL + message(NEWSA, v6)))
    assert counts == {OUT.id: 12, SaId(ip_address("2001:db8::2"), 1, OUT.id.proto): 12}


def test_a_state_that_is_cut_off_is_an_error() -> None:
    with pytest.raises(DecodeError):
        dict(packets_of_sas(message(NEWSA, state()[:200])))
