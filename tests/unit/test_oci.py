"""Containers: the seccomp profile, and the message of the runtime."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecgate.core.codec import oci
from ipsecgate.core.codec.oci import ALLOW, NOTIFY, Container, OciError, container, profile
from ipsecgate.core.codec.seccomp import ABIS, INET_LENGTHS, Notification, destination
from ipsecgate.core.model.policy import HOLD_LONGEST
from tests.unit.oci_messages import STATE

STRICT: dict[str, Any] = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [{"names": ["read", "connect", "sendto", "sendmsg", "sendmmsg"], "action": ALLOW}],
}


# --- the profile ------------------------------------------------------------------------


def met(condition: dict[str, Any], value: int) -> bool:
    """Evaluate an argument comparison as libseccomp does. Source: seccomp_rule_add(3)."""
    match condition["op"]:
        case "SCMP_CMP_MASKED_EQ":
            return bool(value & condition["value"] == condition["valueTwo"])
        case "SCMP_CMP_GT":
            return bool(value > condition["value"])
    raise AssertionError(condition)


def actions(made: dict[str, Any], name: str, value: int) -> set[str]:
    """Return the actions of all rules that match a call, or the default."""
    found = {
        rule["action"]
        for rule in made["syscalls"]
        if name in rule["names"] and all(met(c, value) for c in rule.get("args", ()))
    }
    return found or {made["defaultAction"]}


@pytest.mark.parametrize("base", [None, STRICT], ids=["no base", "strict base"])
@pytest.mark.parametrize("name", ["connect", "sendto"])
def test_a_call_is_held_by_the_length_of_its_address(base: oci.Json | None, name: str) -> None:
    made = profile("/s", 30, "x86_64", base=base)
    for length in (*range(1024), 1 << 16, (1 << 31) - 1, (1 << 32) - 1):
        wanted = NOTIFY if length in INET_LENGTHS else ALLOW
        assert actions(made, name, length) == {wanted}, length


@pytest.mark.parametrize("base", [None, STRICT], ids=["no base", "strict base"])
def test_datagrams_are_held_only_on_request(base: oci.Json | None) -> None:
    for datagrams, wanted in ((False, ALLOW), (True, NOTIFY)):
        made = profile("/s", 30, "x86_64", base=base, datagrams=datagrams)
        for name in ("sendmsg", "sendmmsg"):
            assert actions(made, name, 0) == {wanted}


def test_the_base_profile_keeps_its_rules_for_other_calls() -> None:
    made = profile("/s", 30, "x86_64", base=STRICT)
    assert actions(made, "read", 0) == {ALLOW}
    assert actions(made, "mount", 0) == {"SCMP_ACT_ERRNO"}
    assert made["architectures"] == STRICT["architectures"]


def test_the_profile_passes_the_time_limit_to_the_listener() -> None:
    made = profile("/run/s", 2.5, "aarch64", flags=False)
    assert (made["listenerPath"], made["listenerMetadata"]) == ("/run/s", "ipsecgate hold=2.500")
    assert "flags" not in made
    long = profile("/s", 1e7, "x86_64")["listenerMetadata"]
    parsed = container(json.dumps({**STATE, "metadata": long}).encode())
    assert parsed
    assert parsed.hold == 1e7
    assert profile("/run/s", 2.5, "aarch64")["flags"] == [*oci.FLAGS]


@pytest.mark.parametrize(
    "rule",
    [
        {"names": ["connect"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["connect"], "action": ALLOW, "args": [{"index": 0, "value": 1}]},
        {"names": ["sendto"], "action": ALLOW, "includes": {"caps": ["CAP_NET_RAW"]}},
    ],
)
def test_a_base_with_its_own_rule_for_a_held_call_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(OciError):
        profile("/s", 30, "x86_64", base={**STRICT, "syscalls": [*STRICT["syscalls"], rule]})


def test_a_base_without_the_held_calls_or_with_a_listener_is_refused() -> None:
    for base in ({**STRICT, "syscalls": []}, {**STRICT, "listenerPath": "/other"}):
        with pytest.raises(OciError):
            profile("/s", 30, "x86_64", base=base)


def test_a_call_of_another_architecture_is_ignored() -> None:
    abi = ABIS["x86_64"]

    def read(_where: int, _length: int) -> bytes:
        raise AssertionError("its memory was read")

    i386, x32 = (362, 0x40000003), (0x40000000 | abi.connect, abi.arch)
    for nr, arch in (i386, x32):
        assert destination(Notification(1, 2, nr, arch, (3, 4, 16, 0, 0, 0)), abi, read) is None


# --- the message ------------------------------------------------------------------------


def test_a_runtimes_message_is_parsed() -> None:
    assert container(json.dumps(STATE).encode()) == Container("db", 4422, 2.5, 0)
    executed = {**STATE, "pid": 0}  # by crun
    assert container(json.dumps(executed).encode()) == Container("db", 0, 2.5, 0)
    plain = {**STATE, "fds": ["other", "seccompFd"], "metadata": ""}
    assert container(json.dumps(plain).encode()) == Container("db", 4422, 30.0, 1)


def test_an_incomplete_message_is_none() -> None:
    raw = json.dumps(STATE).encode()
    assert all(container(raw[:end]) is None for end in range(1, len(raw)))


@pytest.mark.parametrize(
    "change",
    [
        {"pid": -1},
        {"pid": True},
        {"pid": "1"},
        {"state": None},
        {"state": {"id": "a\nb"}},
        {"fds": []},
        {"fds": ["seccompFd", "seccompFd"]},
        {"fds": "seccompFd"},
        {"metadata": "somebody else's"},
        {"metadata": "ipsecgate hold=-1"},
        {"metadata": "ipsecgate hold=1e9"},
        {"metadata": "ipsecgate hold=100000001"},
        {"metadata": f"ipsecgate hold={'9' * 400}"},  # infinite
        {"metadata": 1},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_message_with_invalid_fields_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(OciError):
        container(json.dumps({**STATE, **change}).encode())


@pytest.mark.parametrize("raw", [b"[]", b"1", b"[" * oci.MESSAGE_LIMIT, b" " * 70_000])
def test_text_that_is_not_a_message_is_refused(raw: bytes) -> None:
    with pytest.raises(OciError):
        container(raw)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
        | st.sampled_from(["seccompFd", "ipsecgate hold=3"]),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*STATE, "id"]), inner, max_size=6),
        max_leaves=20,
    )
)  # fmt: skip
def test_any_json_is_a_container_or_refused(value: object) -> None:
    raw = json.dumps(value).encode()
    try:
        made = container(raw)
    except OciError:
        return
    assert made is None or (made.pid >= 0 and 0 <= made.hold <= HOLD_LONGEST)
