"""Files: the configuration, and the saved children."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from errno import EACCES, EPERM
from ipaddress import ip_network
from pathlib import Path
from random import Random
from typing import Any

from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import TrafficSelector
from ipsecgate.core.model.ipsec import Action, ChildConfig, ChildName, Mode
from ipsecgate.core.model.policy import Errnos, Policy, SaSource, Settings
from ipsecgate.edges.host import config, saved_state
from ipsecgate.errors import GateError, UsageError
from tests.fuzz import fed_gate as gates
from tests.fuzz.engine import Target, mutate_tree

DEEP = (b"[" * 3000, b'{"a":' * 3000, b"a." * 3000, b"[" * 150, b"{a=" * 150)
NUMBERS = (b"9" * 5000, b"NaN", b"nan", b"Infinity", b"-inf", b"1e999", b"0x7f", b"-1", b"65536")
TEXT = (
    b"\xff", b"\xc3", b"\0", b"\\u0000", b"\\ud800", b"\xed\xa0\x80", b'"', b"'''", b"\r", b"\x1b[",
    b"\xd9\xa3", b"#",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 255, 256, 65535, 65536, 10**30, 0.5, float("nan"), float("inf"),
    "", "x", "\ud800", "\0", "10.0.0.0/8", "10.0.0.1/8", "::1%eth0", "TUNNEL", {}, [], [[]], [0],
    ["10.0.0.0/8", 6, 90, 80], {"ike": "a"},
)  # fmt: skip
TOML: tuple[Any, ...] = (
    "", "x", "\0", "EAGAIN", "EINTR", "any", "tcp", "udp", "0", "1-65535", "2-1", "65536", "\u0663",
    "protect", "discard", "start", "p0", "a b", True, False, 1, 0.5, [], [[]], [1], ["\0"],
    ["::/0"], ["10.0.0.1/8"], ["::ffff:10.0.0.0/104"], ["::1%eth0"], ["10.0.0.0/8", "x"],
    ["0.0.0.0/0"] * 3,
    [f"10.{n}.0.0/{n % 24 + 8}" for n in range(0, 256, 8)],
)  # fmt: skip
KINDS = (b"{}", b"[]", b'""', b"null", b"true", b"false", b"[[]]", b"1979-05-27T07:32:00Z", b"0.5")


class Folder(Target):
    """A decoder of a file in a folder of its own; it must change neither."""

    words: tuple[bytes, ...] = (*DEEP, *NUMBERS, *TEXT, *KINDS)

    def __init__(self) -> None:
        shm = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else None))
        self._path = self._folder / "input"
        self._given = b""

    def _write(self, data: bytes) -> None:
        self._given = data
        self._path.write_bytes(data)

    def state(self) -> object:
        there = sorted(path for path in self._folder.rglob("*") if path.is_file())
        changed = self._path.exists() and self._path.read_bytes() != self._given
        return [path for path in there if path != self._path], changed

    def close(self) -> None:
        shutil.rmtree(self._folder)


def _toml(value: object) -> str:
    return json.dumps(value)  # TOML and JSON write strings, booleans and lists of them alike


class Config(Folder):
    """ipsecgate.toml, and the tables that the gate builds from it."""

    name = "config"
    shaped = True
    refusals = (UsageError,)
    words = (
        *Folder.words, b"[[policy]]\n", b"[gate]\n", b"[errno]\n", b"[policy.x]\n", b"=", b"\n",
        b"policy=1\n", b"host=true\n", b"::/0", b"0.0.0.0/0", b"::ffff:10.0.0.0/104", b"1-65535",
        b"fe80::1%eth0", b"10.0.0.0/255.0.0.0", b"start", b"discard", b"70000", b"9-1",
    )  # fmt: skip

    def real(self, random: Random) -> tuple[bytes, Any]:
        policies = tuple(self._policy(random, n) for n in range(random.choice((0, 1, 1, 2))))
        audit, deny, host = (random.random() < 0.5 for _ in range(3))
        source = random.choice(list(SaSource))
        refusal = random.choice((EPERM, EACCES))
        cgroups = () if host else random.choice(((), ("unit:a",), ("/sys/fs/cgroup/Ω", "unit:b")))
        lines = [
            "[gate]",
            f"mode = {_toml('audit' if audit else 'enforce')}",
            f"default = {_toml('deny' if deny else 'allow')}",
            f"cgroups = {_toml(list(cgroups))}",
            f"host = {_toml(host)}",
            'vici = "/run/x.vici"',
            f"sa_source = {_toml(source.value)}",
            "[errno]",
            f"uncovered = {_toml('EPERM' if refusal == EPERM else 'EACCES')}",
            *(line for policy in policies for line in self._lines(policy)),
        ]
        settings = Settings(policies, audit, deny, Errnos(uncovered=refusal), source, floor=host)
        meant = config.Config(settings, cgroups, host, Path("/run/x.vici"))
        return "\n".join(lines).encode(), meant

    def damaged(self, random: Random) -> bytes:
        lines = self.real(random)[0].split(b"\n")
        at = random.randrange(len(lines))
        key, equals, _ = lines[at].partition(b" = ")
        value = random.choice(self.words)
        if random.random() < 0.5:
            value = _toml(random.choice(TOML)).encode()
        lines[at] = key + equals + value if equals else value
        return b"\n".join(lines)

    def _policy(self, random: Random, number: int) -> Policy:
        remote = random.choice(("10.2.0.0/16", "2001:db8::/48", "192.0.2.1/32"))
        proto = random.choice((0, 6, 17))
        ports = random.choice(((443, 443), (5300, 5307))) if proto else (0, 65535)
        action = random.choice(list(Action))
        protect = action is Action.PROTECT
        child = random.choice((None, "gw/net")) if protect else None
        start = protect and random.random() < 0.5
        return Policy(f"p{number}", (ip_network(remote),), action, proto, ports, child, start)

    def _lines(self, policy: Policy) -> list[str]:
        low, high = policy.ports
        ports = "any" if high == 65535 else str(low) if low == high else f"{low}-{high}"
        return [
            "[[policy]]",
            f"name = {_toml(policy.name)}",
            f"remote = {_toml([str(network) for network in policy.remote])}",
            f"protocol = {_toml({0: 'any', 6: 'tcp', 17: 'udp'}[policy.proto])}",
            f"port = {_toml(ports)}",
            f"action = {_toml(policy.action.name.lower())}",
            f"child = {_toml(policy.child or '')}",
            f"initiate = {_toml('start' if policy.start else 'on-demand')}",
        ]

    def feed(self, data: bytes) -> Any:
        self._write(data)
        got = config.load(self._path)
        for text in (*got.cgroups, os.fspath(got.vici)):
            assert "\0" not in text, "no path has a NUL"
        gate = Gate(got.settings)
        for command in gate.start():
            gates.write(command)
        gates.step(gate, on.IkeConnected((gates.CHILD,), (), 7), gates.KERNEL)
        return got


class Memory(Folder):
    """The saved children, and the tables that the gate builds from them."""

    name = "memory"
    shaped = True
    refusals = (GateError,)
    words = (*Folder.words, b"{", b"}", b"[", b"]", b",", b":", b'"ike"', b"TUNNEL", b"90, 80")

    def real(self, random: Random) -> tuple[bytes, Any]:
        children = tuple(
            ChildConfig(
                ChildName(f"gw{number}", random.choice(("net", "Ω"))), random.choice(list(Mode)),
                self._side(random), self._side(random),
            )
            for number in range(random.choice((0, 1, 1, 2)))
        )  # fmt: skip
        saved_state.save_children(self._path, children)
        return self._path.read_bytes(), children

    def damaged(self, random: Random) -> bytes:
        tree = json.loads(self.real(random)[0])
        for _ in range(random.choice((1, 1, 2))):
            mutate_tree(random, tree, OTHERS)
        return json.dumps(tree).encode()

    def _side(self, random: Random) -> tuple[TrafficSelector, ...]:
        return tuple(
            TrafficSelector(
                ip_network(random.choice(("10.2.0.0/16", "2001:db8::/48", "0.0.0.0/0"))),
                random.choice((0, 6, 255)),
                random.choice(((0, 65535), (443, 443), (5300, 5307), (65535, 0))),
            )
            for _ in range(random.choice((1, 1, 2)))
        )

    def feed(self, data: bytes) -> Any:
        self._write(data)
        children = saved_state.load_children(self._path)
        if data.strip() and not children:
            assert json.loads(data) == [], "a broken file is never an empty set"
        gate = Gate(Settings(), children)
        for command in gate.start():
            gates.write(command)
        return children
