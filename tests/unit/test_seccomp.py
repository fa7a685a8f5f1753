"""The seccomp filter, run as in the kernel, and the decoders of notifications and addresses."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecgate.core.codec import seccomp
from ipsecgate.core.codec.seccomp import (
    ABIS,
    CONTINUE,
    RET_ALLOW,
    RET_USER_NOTIF,
    Abi,
    Notification,
    NotificationError,
    destination,
    has_signal,
    notification,
    program,
    response,
    sockaddr,
    thread_group,
)

X86, ARM = ABIS["x86_64"], ABIS["aarch64"]
I386, X32 = 0x40000003, 0x40000000
DATA = struct.Struct("=iIQ6Q")  # struct seccomp_data
WORD = st.integers(0, 2**64 - 1)


def verdict(code: bytes, arch: int, nr: int, *args: int) -> int:
    """Run a classic BPF program that loads, compares and returns."""
    data = DATA.pack(nr, arch, 0, *args, *[0] * (6 - len(args)))
    lines = list(struct.iter_unpack("=HBBI", code))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, k = lines[at]
        at += 1
        if operation == seccomp.LOAD:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif operation == seccomp.JUMP_EQUAL:
            at += if_true if accumulator == k else if_false
        else:
            assert operation == seccomp.RETURN
            return int(k)


@pytest.mark.parametrize("abi", [X86, ARM], ids=["x86_64", "aarch64"])
@pytest.mark.parametrize("length", [0, 2, 12, 15, 16, 17, 20, 28, 29, 110, 127, 128, 129])
def test_only_the_lengths_of_internet_addresses_are_reported(abi: Abi, length: int) -> None:
    wanted = RET_USER_NOTIF if length in (16, 28, 128) else RET_ALLOW
    code = program(abi)
    for high in (0, 0xDEAD << 32):  # the kernel takes an int and ignores the upper half
        assert verdict(code, abi.arch, abi.connect, 3, 1, high | length) == wanted
        assert verdict(code, abi.arch, abi.sendto, 3, 1, 16, 16, 1, high | length) == wanted


@pytest.mark.parametrize("abi", [X86, ARM], ids=["x86_64", "aarch64"])
def test_message_calls_are_reported_only_on_request(abi: Abi) -> None:
    for number in (abi.sendmsg, abi.sendmmsg):
        assert verdict(program(abi), abi.arch, number, 3, 1) == RET_ALLOW
        assert verdict(program(abi, datagrams=True), abi.arch, number, 3, 1) == RET_USER_NOTIF


@given(nr=st.integers(0, 2**31 - 1), args=st.lists(WORD, min_size=6, max_size=6))
def test_every_other_call_is_allowed(nr: int, args: list[int]) -> None:
    code = program(X86, datagrams=True)
    if nr not in (X86.connect, X86.sendto, X86.sendmsg, X86.sendmmsg):
        assert verdict(code, X86.arch, nr, *args) == RET_ALLOW
    assert verdict(code, X86.arch, X32 | nr, *args) == RET_ALLOW
    assert verdict(code, I386, nr, *args) == RET_ALLOW
    assert verdict(code, ARM.arch, nr, *args) == RET_ALLOW


# --- notifications ------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_a_notification_of_another_size_is_an_error(raw: bytes) -> None:
    if len(raw) != 80:
        with pytest.raises(NotificationError, match=r"not 80"):
            notification(raw)
    else:
        assert notification(raw).fd <= 0xFFFFFFFF


def test_a_notification_has_the_kernels_layout() -> None:
    raw = struct.pack("=QII", 77, 1234, 0) + DATA.pack(42, X86.arch, 5, 3, 4096, 16, 0, 0, 0)
    assert notification(raw) == Notification(77, 1234, 42, X86.arch, (3, 4096, 16, 0, 0, 0))


def test_a_response_either_continues_or_fails_the_call() -> None:
    assert seccomp.RESPONSE.unpack(response(77, None)) == (77, 0, 0, CONTINUE)
    assert seccomp.RESPONSE.unpack(response(77, 110)) == (77, 0, -110, 0)


# --- addresses ----------------------------------------------------------------------------

V4 = struct.pack("=H", 2) + struct.pack("!H", 5432) + bytes([10, 2, 0, 9]) + bytes(8)
V6 = (
    struct.pack("=H", 10) + struct.pack("!HI", 5432, 0) + IPv6Address("2001:db8::9").packed
    + bytes(4)
)  # fmt: skip
MAPPED = V6[:8] + IPv6Address("::ffff:10.2.0.9").packed + bytes(4)


@pytest.mark.parametrize(
    ("raw", "address"),
    [(V4, "10.2.0.9"), (V4.ljust(128, b"\1"), "10.2.0.9"), (V6, "2001:db8::9"),
     (V6[:24], "2001:db8::9"), (MAPPED, "10.2.0.9")],
)  # fmt: skip
def test_an_internet_address_is_decoded(raw: bytes, address: str) -> None:
    assert sockaddr(raw) == (ip_address(address), 5432)


@pytest.mark.parametrize("raw", [b"", V4[:15], V6[:23], b"\1\0/run/a.sock".ljust(28, b"\0")])
def test_other_addresses_are_none(raw: bytes) -> None:
    assert sockaddr(raw) is None


def test_an_unspecified_family_disconnects_in_connect_and_is_ipv4_in_sendto() -> None:
    raw = b"\0\0" + V4[2:]
    assert sockaddr(raw) is None
    assert sockaddr(raw, to_send=True) == (ip_address("10.2.0.9"), 5432)


@given(st.binary(max_size=140), st.booleans())
def test_any_bytes_decode_to_an_address_or_none(raw: bytes, to_send: bool) -> None:
    found = sockaddr(raw, to_send=to_send)
    assert found is None or (isinstance(found[0], IPv4Address | IPv6Address) and found[1] < 65536)


MEMORY = {0x1000: V4, 0x2000: struct.pack("=QI", 0x1000, 16), 0x3000: V6}


def read(where: int, length: int) -> bytes:
    return MEMORY.get(where, b"")[:length]


@pytest.mark.parametrize(
    ("nr", "args"),
    [(X86.connect, (3, 0x1000, 16, 0, 0, 0)), (X86.sendto, (3, 0, 0, 0, 0x1000, 16)),
     (X86.sendmsg, (3, 0x2000, 0, 0, 0, 0)), (X86.sendmmsg, (3, 0x2000, 2, 0, 0, 0))],
)  # fmt: skip
def test_each_call_has_its_address_in_its_own_argument(nr: int, args: tuple[int, ...]) -> None:
    assert destination(Notification(1, 2, nr, X86.arch, args), X86, read) == (
        ip_address("10.2.0.9"),
        5432,
    )


@given(nr=st.sampled_from([X86.connect, X86.sendto, X86.sendmsg, X86.sendmmsg]),
       args=st.tuples(*[st.sampled_from([0, 16, 28, 128, *MEMORY]) | WORD] * 6))  # fmt: skip
def test_no_argument_makes_us_read_more_than_an_address(nr: int, args: tuple[int, ...]) -> None:
    asked: list[int] = []

    def careful(where: int, length: int) -> bytes:
        asked.append(length)
        return read(where, length)

    destination(Notification(1, 2, nr, X86.arch, args), X86, careful)
    assert all(length <= 128 for length in asked), "whatever length the caller claims"


# --- signals -------------------------------------------------------------------------------


def status(pending: int = 0, shared: int = 0, blocked: int = 0, caught: int = 0,
           threads: int = 1) -> str:  # fmt: skip
    return (
        f"Name:\tx\nTgid:\t812\nPid:\t813\nThreads:\t{threads}\nSigQ:\t0/1\n"
        f"SigPnd:\t{pending:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\n"
        f"SigIgn:\t{0:016x}\nSigCgt:\t{caught:016x}\n"
    )


@pytest.mark.parametrize(
    ("words", "certain"),
    [
        ({"pending": 2, "caught": 2}, True),
        ({"shared": 2, "caught": 2}, True),
        ({"shared": 2, "caught": 2, "threads": 2}, False),  # the other may handle it
        ({"pending": 2, "caught": 2, "threads": 2}, True),
        ({"pending": 2, "caught": 2, "blocked": 2}, False),
        ({"pending": 2, "caught": 4}, False),
        ({"pending": 6, "caught": 6, "blocked": 2}, True),
        ({}, False),
    ],
)
def test_only_a_signal_that_this_thread_must_handle_is_certain(
    words: dict[str, int], certain: bool
) -> None:
    assert has_signal(status(**words)) is certain


def test_a_process_name_cannot_forge_a_status_line() -> None:
    forged = "Name:\tSigPnd:\t2\\nSigPnd:\t2\n" + status(caught=2)
    assert not has_signal(forged)


def test_the_process_of_a_thread_is_read_from_its_status() -> None:
    assert thread_group(status()) == 812
    with pytest.raises(NotificationError, match="Tgid"):
        thread_group("")
    with pytest.raises(NotificationError):
        thread_group("Tgid:\tff\n")
