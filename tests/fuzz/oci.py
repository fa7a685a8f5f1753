"""Containers: the message of a runtime with its listener, and a profile to extend."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from ipsecgate.core.codec import oci
from ipsecgate.core.model.policy import HOLD
from tests.fuzz.engine import Target
from tests.fuzz.files import DEEP, KINDS, NUMBERS, TEXT

WORDS = (*DEEP, *NUMBERS, *TEXT, *KINDS, b"{", b"}", b":", b",", b"null", b" " * 70_000)


class UnfinishedError(Exception):
    """The message is incomplete."""


class State(Target):
    """A container process state, as received so far."""

    name = "container"
    refusals = (oci.OciError, UnfinishedError)
    words = (*WORDS, b'"pid"', b'"fds"', b'"seccompFd"', b'"metadata"', b"ipsecgate hold=")

    def real(self, random: Random) -> tuple[bytes, Any]:
        others = ["other"] * random.randrange(3)
        name, pid = random.choice(("db", "Ω", "a" * 64)), random.getrandbits(22)
        hold = random.choice((None, 0.5, 30, 1e5))
        state = {
            "ociVersion": "1.0.2",
            "fds": [*others, oci.LISTENER],
            "pid": pid,
            "metadata": "" if hold is None else f"ipsecgate hold={hold:.1f}",
            "state": {"id": name, "status": "creating", "pid": pid, "bundle": "/b"},
        }
        raw = json.dumps(state, indent=random.choice((None, 4))).encode()
        return raw, oci.Container(name, pid, HOLD if hold is None else hold, len(others))

    def feed(self, data: bytes) -> Any:
        made = oci.container(data)
        if made is None:
            raise UnfinishedError
        return made


class Profile(Target):
    """An operator's profile, to be extended."""

    name = "profile"
    refusals = oci.UNFIT
    words = (*WORDS, b'"syscalls"', b'"names"', b'"args"', b'"action"', b'"connect"', b'"sendto"')

    def real(self, random: Random) -> tuple[bytes, Any]:
        action = random.choice((oci.ALLOW, "SCMP_ACT_ERRNO", "SCMP_ACT_KILL"))
        rule = {"names": ["read", "connect", "sendto"], "action": oci.ALLOW}
        rules = [rule, {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
        return json.dumps({"defaultAction": action, "syscalls": rules}).encode(), action

    def feed(self, data: bytes) -> Any:
        made = oci.profile("/s", 30, "x86_64", base=oci.base(data))
        assert made["listenerPath"] == "/s"
        assert any(rule["action"] == oci.NOTIFY for rule in made["syscalls"])
        json.dumps(made)
        return made["defaultAction"]
