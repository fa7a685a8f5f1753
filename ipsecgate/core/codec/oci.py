"""OCI containers: the seccomp profile that holds their calls, and the runtime's message.

    profile -> runtime -> the filter, and one message with its listener, to `listenerPath`

The profile selects the same calls as the filter in `core.codec.seccomp`. Here libseccomp compiles
it.

Source: the OCI runtime specification, config-linux.md, "Seccomp" and "The Container
Process State"; seccomp_rule_add(3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ipsecgate.core.codec.seccomp import INET_LENGTHS
from ipsecgate.core.model.policy import HOLD, HOLD_LONGEST
from ipsecgate.core.model.value import value

Json = dict[str, Any]

MESSAGE_LIMIT = 64 << 10  # bytes, including annotations
ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}
FLAGS = ("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",)
LENGTHS = {"connect": 2, "sendto": 5}  # the index of the argument with the address length
ALLOW, NOTIFY = "SCMP_ACT_ALLOW", "SCMP_ACT_NOTIFY"
LISTENER = "seccompFd"
METADATA = re.compile(r"ipsecgate hold=(\d+(?:\.\d+)?)")
BITS = 8  # enough for each of `INET_LENGTHS`
LOW_HALF = 0xFFFFFFFF  # of an argument; a length has 32 bits


class OciError(ValueError):
    """A profile that cannot be extended, or an invalid message."""


# --- the profile ------------------------------------------------------------------------

UNFIT = (OciError, KeyError, TypeError, AttributeError)
"""The errors of `profile` for an invalid base."""


def base(raw: bytes) -> Json:
    """Parse a profile to extend. Raises: OciError."""
    try:
        read = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise OciError(f"not JSON: {error}") from error
    if not isinstance(read, dict):
        raise OciError("not a seccomp profile")
    return read


def profile(
    listener: str,
    hold: float,
    machine: str,
    *,
    datagrams: bool = False,
    flags: bool = True,
    base: Json | None = None,
) -> Json:
    """Return a container's `linux.seccomp`, which holds its calls for up to `hold` seconds.

    `datagrams`: also hold sendmsg() and sendmmsg(). `flags`: only a fatal signal interrupts a held
    call. `base`: a profile that stays in force for all other calls; None allows them all.
    Raises: `UNFIT`.
    """
    if base is None:
        base = {"defaultAction": ALLOW, "architectures": list(ARCHITECTURES[machine])}
    names = [*LENGTHS, *(("sendmsg", "sendmmsg") if datagrams else ())]
    rules, allowed = _without(base, names)
    for name in names:
        if name not in allowed:
            raise OciError(f"the profile does not allow {name}, so its calls cannot be held")
        rules += [_rule(name, NOTIFY, each) for each in _internet(name)]
        if base["defaultAction"] != ALLOW and name in LENGTHS:
            rules += [_rule(name, ALLOW, each) for each in _others(LENGTHS[name])]
    made = {**base, "syscalls": rules, "listenerPath": listener}
    made["listenerMetadata"] = f"ipsecgate hold={hold:.3f}"
    if flags:
        made["flags"] = [*dict.fromkeys([*base.get("flags", ()), *FLAGS])]
    return made


def _without(base: Json, names: Sequence[str]) -> tuple[list[Json], set[str]]:
    """Return a profile's rules without those for `names`, and the names that it allows.

    A call that the profile forbids, or allows only under conditions, cannot be held.
    """
    if base.get("listenerPath"):
        raise OciError("the profile already has a listener")
    allowed = set(names) if base["defaultAction"] == ALLOW else set()
    rules: list[Json] = []
    for rule in base.get("syscalls") or ():
        ours = [name for name in rule["names"] if name in names]
        if ours and (
            rule["action"] != ALLOW or any(map(rule.get, ("args", "includes", "excludes")))
        ):
            raise OciError(f"the profile has its own rule for {', '.join(ours)}")
        allowed.update(ours)
        others = [name for name in rule["names"] if name not in names]
        if others:
            rules.append({**rule, "names": others})
    return rules, allowed


def _rule(name: str, action: str, condition: Json | None) -> Json:
    return {"names": [name], "action": action, "args": [condition] if condition else []}


def _internet(name: str) -> list[Json | None]:
    """Return the conditions under which a call is held, one rule each; None: always."""
    if name not in LENGTHS:
        return [None]
    return [_masked(LENGTHS[name], length, LOW_HALF) for length in INET_LENGTHS]


def _others(index: int) -> Iterator[Json]:
    """Yield conditions that together match every length except `INET_LENGTHS`.

    libseccomp cannot combine conditions on one argument with "and", but it has masks: so the
    complement is divided into blocks of 2^n values.
    """
    yield {"index": index, "value": (1 << BITS) - 1, "op": "SCMP_CMP_GT"}
    for first, mask in blocks(INET_LENGTHS):
        yield _masked(index, first, mask)


def _masked(index: int, value: int, mask: int) -> Json:
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


def blocks(without: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first value, mask) of aligned blocks: all numbers of `BITS` bits except `without`."""
    todo = [(0, BITS)]
    while todo:
        first, bits = todo.pop()
        if not any(first <= value < first + (1 << bits) for value in without):
            yield first, LOW_HALF + 1 - (1 << bits)
        elif bits:
            todo += [(first, bits - 1), (first + (1 << bits - 1), bits - 1)]


# --- the message ------------------------------------------------------------------------


@value
class Container:
    """A container: its process, and how long its calls are held in seconds.

    `pid` 0: unknown, as for `crun exec`. `listener` is the index of the seccomp listener among the
    descriptors that came with the message.
    """

    name: str
    pid: int
    hold: float
    listener: int


def container(raw: bytes) -> Container | None:
    """Parse a container process state; None while it is incomplete. Raises: OciError."""
    if len(raw) > MESSAGE_LIMIT:
        raise OciError(f"the message is longer than {MESSAGE_LIMIT} bytes")
    try:
        state = json.loads(raw)
    except ValueError:
        return None
    except RecursionError as error:
        raise OciError("the message is not a container process state") from error
    if not isinstance(state, dict):
        raise OciError("the message is not a container process state")
    pid, name = state.get("pid"), _of(state.get("state"), "id")
    fds, metadata = state.get("fds"), state.get("metadata", "")
    if type(pid) is not int or pid < 0 or not isinstance(name, str) or not name.isprintable():
        raise OciError("the container has no process, or no printable name")
    if not isinstance(fds, list) or fds.count(LISTENER) != 1:
        raise OciError(f"container {name} sent no {LISTENER}, or several")
    found = METADATA.fullmatch(metadata) if isinstance(metadata, str) else None
    if metadata and found is None:
        raise OciError(
            f"container {name} has a profile that `ipsecgate seccomp-profile` did not print"
        )
    hold = float(found[1]) if found else HOLD
    if hold > HOLD_LONGEST:
        raise OciError(
            f"container {name} asks for a hold of {hold:.0f} s, more than {HOLD_LONGEST:.0f} s"
        )
    return Container(name, pid, hold, fds.index(LISTENER))


def _of(state: object, key: str) -> object:
    return state.get(key) if isinstance(state, Mapping) else None
