"""A packet goes where its header says, whatever its socket said at connect().

Attacks that send a packet elsewhere than the hooks were asked about: routing headers, source
routes, devices, hand-written protocols. Each has a twin that must pass: real answers.
"""

from __future__ import annotations

import contextlib
import platform
import struct
import subprocess
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipsecgate.core.tables.layout import Reason, Setting
from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.lab.netns import Namespace
from tests.system.caller import Caller
from tests.system.hooked_cgroup import HERE, OTHER, PEER, HookedCgroup
from tests.system.test_backstop import SPI, udp, v4, v6

UDP, ESP, AH = 17, 50, 51
FORMS = {"4": "{}", "6": "{}", "mapped": "::ffff:{}"}


@pytest.mark.parametrize(
    ("attack", "to", "reason"),
    [
        ("udp6 route connect send", f"::1%{OTHER[6]}", Reason.BLOCK_DEFAULT),
        ("udp6 route sendto", f"::1%{OTHER[6]}", Reason.BLOCK_DEFAULT),
        ("udp6 route connect send", f"::1%{PEER[6]}", Reason.BLOCK_CLEAR),
        ("tcp6 route begin", f"::1%{OTHER[6]}", Reason.BLOCK_DEFAULT),
        ("udp4 source-route sendto", f"127.0.0.1%{OTHER[4]}", Reason.BLOCK_UNREADABLE),
        ("udp4 device connect send", "127.0.0.1", Reason.BLOCK_DEFAULT),
        ("udp6 device connect send", "::1", Reason.BLOCK_DEFAULT),
        ("udp6 device connect send", "::ffff:127.0.0.1", Reason.BLOCK_DEFAULT),
        ("tcp4 device begin", "127.0.0.1", Reason.BLOCK_DEFAULT),
        ("tcp6 device begin", "::1", Reason.BLOCK_DEFAULT),
        ("udp4 through sendto", "127.0.0.1", Reason.BLOCK_DEFAULT),
        ("udp6 through sendto", "::1", Reason.BLOCK_DEFAULT),
        ("udp4 pktinfo", "127.0.0.1", Reason.BLOCK_DEFAULT),
        ("udp6 pktinfo", "::1", Reason.BLOCK_DEFAULT),
    ],
)
def test_a_packet_to_loopback_that_leaves_the_host_is_blocked(
    hooked: HookedCgroup, attack: str, to: str, reason: Reason
) -> None:
    """Loopback is exempt only because it does not leave the host."""
    hooked.data.set(Setting.DENY, 1)
    hooked.data.set_tunnels(())
    result = hooked.gated(f"forge {attack}", to)
    assert hooked.counted(reason) == 1
    assert result == ("" if "begin" in attack else "EPERM")
    hooked.gated.forget()


def blocked(hooked: HookedCgroup) -> None:
    """Wait until default deny has blocked a packet."""
    deadline = time.monotonic() + 10
    while not hooked.counted(Reason.BLOCK_DEFAULT):
        assert time.monotonic() < deadline, "no packet was sent that way, or it left"
        time.sleep(0.02)


# Older kernels run no program for packets of a listening socket: docs/threat-model.md.
SYN_ACKS_ARE_ASKED_ABOUT = tuple(map(int, platform.release().split(".")[:2])) >= (6, 6)


def test_a_syn_ack_with_a_routing_header_is_blocked(hooked: HookedCgroup) -> None:
    """A gated server sets the header, and any client on loopback makes it send a SYN-ACK."""
    hooked.data.set(Setting.DENY, 1)
    try:
        assert hooked.gated("forge tcp6 route listen", f"::1%{OTHER[6]}", 8081) == ""
        hooked.free("tcp", "::1", 8081)
        if SYN_ACKS_ARE_ASKED_ABOUT:
            blocked(hooked)
        else:
            assert hooked.counted(Reason.BLOCK_DEFAULT) == 0
    finally:
        hooked.gated.forget()


def test_a_routing_header_set_on_an_established_connection_is_blocked(hooked: HookedCgroup) -> None:
    hooked.data.set(Setting.DENY, 1)
    assert hooked.free("forge tcp6 listen", "::1", 8080) == ""
    assert hooked.gated("forge tcp6 connect send", "::1", 8080) == ""
    assert hooked.free("forge accept receive", "::1") == ""
    assert hooked.gated("forge abort route send", f"::1%{OTHER[6]}") == ""
    blocked(hooked)
    hooked.gated.forget()
    hooked.free.forget()


def test_default_deny_applies_to_raw_sockets(hooked: HookedCgroup) -> None:
    """No hook sees what they write. The kernel's own answers, RST and ACK without data, pass."""
    hooked.data.set(Setting.DENY, 1)

    def tcp(flags: int, payload: bytes = b"") -> bytes:
        return struct.pack("!HHIIBBHHH", 80, 9000, 1, 1, 5 << 4, flags, 0, 0, 0) + payload

    syn, rst, ack = 2, 4, 16
    for packet in (udp(9, 9), udp(4500, 4500, SPI)):
        assert hooked.gated(v4(packet, to=OTHER[4]), OTHER[4]) == "EPERM"
        assert hooked.gated(v6(UDP, packet, to=OTHER[6]), OTHER[6]) == "EPERM"
    for segment in (tcp(syn), tcp(syn | ack), tcp(ack, b"data"), tcp(ack)[:12]):
        assert hooked.gated(v4(segment, 6, to=OTHER[4]), OTHER[4]) == "EPERM"
    assert hooked.counted(Reason.BLOCK_DEFAULT) == 8
    for segment in (tcp(rst), tcp(rst | ack), tcp(ack)):
        assert hooked.gated(v4(segment, 6, to=OTHER[4]), OTHER[4]) == ""
        assert hooked.gated(v6(6, segment, to=OTHER[6]), OTHER[6]) == ""
    assert hooked.counted(Reason.BLOCK_DEFAULT) == 8


def test_only_the_router_alert_option_may_leave(hooked: HookedCgroup) -> None:
    hooked.data.set_tunnels(())
    through, loose = OTHER[4], bytes([131, 7, 4]) + ip_address(PEER[4]).packed + b"\0"
    alert = bytes([148, 4, 0, 0])
    for proto in (2, ESP, AH):
        for options in (loose, loose[:7] + b"\x01", alert + loose):
            call = v4(SPI + bytes(16), proto, to=through, options=options)
            assert hooked.gated(call, through) == "EPERM"
    assert hooked.counted(Reason.BLOCK_UNREADABLE) == 9
    assert hooked.gated(v4(bytes(8), 2, to=through, options=alert), through) == ""


@contextlib.contextmanager
def neighbour(hooked: HookedCgroup, name: str) -> Iterator[Caller]:
    """Make a host with the addresses that no policy names, on a link of its own."""
    far = Namespace(name)
    try:
        here, there = ["ip", "-n", hooked.namespace.name], ["ip", "-n", name]
        macs = "02:00:00:00:00:01", "02:00:00:00:00:02"
        link = f"link add far0 address {macs[0]} type veth peer name far1 address {macs[1]} netns"
        subprocess.run([*here, *link.split(), name], check=True)
        for host, words in (
            (there, "link set far1 up"),
            (here, "link set far0 up"),
            (there, f"addr add {OTHER[4]} dev far1"),
            (there, f"addr add {OTHER[6]} dev far1 nodad"),
            *(
                (there, f"neigh add {address} lladdr {macs[0]} dev far1")
                for address in HERE.values()
            ),
            *((there, f"route add {address} dev far1") for address in HERE.values()),
            *(
                (here, f"neigh add {address} lladdr {macs[1]} dev far0")
                for address in OTHER.values()
            ),
            *((here, f"route add {address} dev far0") for address in OTHER.values()),
        ):
            subprocess.run([*host, *words.split()], check=True)
        caller = Caller(far.path, None)
        try:
            yield caller
        finally:
            caller.close()
            # The kernel removes what is in a namespace later than the namespace.
            subprocess.run([*here, "link", "delete", "far0"], check=True)
    finally:
        far.remove()


@pytest.mark.parametrize("form", FORMS)
def test_answers_of_a_gated_server_leave(
    hooked: HookedCgroup, unique: str, cache: Path, form: str
) -> None:
    """SYN-ACKs and data of a server pass under `deny`, and before policies are known."""
    hooked.data.set(Setting.DENY, 1)
    family = 6 if form == "6" else 4
    kind = "tcp4" if form == "4" else "tcp6"
    here = str(HERE[family])
    pins = Pins(Path("/sys/fs/bpf"), unique)
    with neighbour(hooked, f"{unique}-far") as far:
        assert hooked.gated(f"forge {kind} listen", FORMS[form].format(here), 8080) == ""
        assert far(f"forge tcp{family} connect", here, 8080) == ""
        assert hooked.gated("forge accept send", here) == ""
        assert far("forge receive", here) == ""
        pins.load(bytecode.get(cache))
        pins.attach(hooked.cgroup)
        assert hooked.gated("forge send", here) == ""
        assert far("forge receive", here) == ""
        with Maps(pins) as maps:
            assert maps.counters()[Reason.BLOCK_NOT_READY] == 0
            result = hooked.gated("forge tcp6 route begin", f"::1%{OTHER[6]}")
            assert (result, maps.counters()[Reason.BLOCK_NOT_READY]) == ("", 1)
        pins.unload()
        assert hooked.gated("udp connect", OTHER[family]) == "EPERM"
        hooked.gated.forget()
