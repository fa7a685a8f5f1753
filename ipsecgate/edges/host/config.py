"""Read ipsecgate.toml and policies.d/*.toml. Everything wrong is told by file and key.

Nothing here changes anything: a configuration is read whole, or refused whole.
"""

from __future__ import annotations

import errno
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

from ipsecgate import trust
from ipsecgate.core.model.flow import PORT_MASK, PROTOCOLS, Network
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Errnos, Policy, SaSource, Settings
from ipsecgate.core.tables.policy_rules import policy_rules
from ipsecgate.core.tables.table import TableFullError, compile_table
from ipsecgate.errors import UsageError

T = TypeVar("T")

DEFAULT_VICI = Path("/run/charon.vici")

# What clients were seen to take for a clean failure; EAGAIN only on request,
# because some believe that they are connected. EINTR and EINPROGRESS never.
ERRNOS = (
    "EPERM",
    "EACCES",
    "ECONNREFUSED",
    "EHOSTUNREACH",
    "ENETUNREACH",
    "ETIMEDOUT",
    "EAGAIN",
)


@dataclass(frozen=True, slots=True)
class Config:
    """One instance's configuration. `cgroups` as written: paths, unit:NAME, container:ID."""

    settings: Settings = field(default_factory=Settings)
    cgroups: tuple[str, ...] = ()
    host: bool = False
    vici: Path = DEFAULT_VICI


class _Table:
    """A TOML table that knows where it stands, and which of its keys were read."""

    def __init__(self, data: object, file: Path, name: str) -> None:
        self.file = file
        self.name = name
        if not isinstance(data, Mapping):
            raise self.error("", "must be a table")
        self.data = dict(data)

    def error(self, key: str, message: str, hint: str = "") -> UsageError:
        where = ".".join(part for part in (self.name, key) if part)
        return UsageError(f"{self.file}: {where}: {message}", hint=hint)

    def take(self, key: str, kind: type[T], default: T) -> T:
        value = self.data.pop(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"must be {_KINDS[kind]}, not {short(value)}")
        if kind is str and "\0" in str(value):
            raise self.error(key, "must not contain a NUL character")
        return value

    def choice(self, key: str, options: tuple[str, ...], default: str) -> str:
        value = self.take(key, str, default)
        if value not in options:
            raise self.error(key, f"{short(value)} is not one of {', '.join(options)}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.take(key, list, [])
        for value in values:
            if not isinstance(value, str) or "\0" in value:
                raise self.error(key, f"must be a list of strings, not of {short(value)}")
        return values

    def parsed(self, key: str, text: str, parse: Callable[[str], T]) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise self.error(key, str(error)) from error

    def finish(self, known: tuple[str, ...]) -> None:
        for key in self.data:
            near = get_close_matches(key, known, 1)
            raise self.error(key, "unknown key", f"did you mean {near[0]!r}?" if near else "")


_KINDS: dict[type, str] = {str: "a string", bool: "true or false", list: "a list", dict: "a table"}


def load(path: Path, *, required: bool = True) -> Config:
    """Read a configuration file and the policies.d folder beside it.

    Without the file, and not `required`, the defaults hold. Raises: UsageError.
    """
    if not required and not path.exists():
        return Config()
    document = _Table(_read(path), path, "")
    gate = _Table(document.take("gate", dict, {}), path, "gate")
    errnos = _errnos(_Table(document.take("errno", dict, {}), path, "errno"))
    policies = _policies(document, path)
    document.finish(("gate", "errno", "policy"))
    for extra in sorted((path.parent / "policies.d").glob("*.toml")):
        table = _Table(_read(extra), extra, "")
        policies += _policies(table, extra)
        table.finish(("policy",))
    _refuse_duplicates(policies)
    _refuse_too_many(policies, path)

    mode = gate.choice("mode", ("enforce", "audit"), "enforce")
    default = gate.choice("default", ("allow", "deny"), "allow")
    source = gate.choice("sa_source", tuple(one.value for one in SaSource), SaSource.AUTO.value)
    live_flows = gate.choice("live_flows", ("block", "destroy"), "block")
    floor = gate.choice("floor", ("none", "xfrm-block"), "none")
    config = Config(
        settings=Settings(
            policies=tuple(policy for policy, _ in policies),
            audit=mode == "audit",
            deny=default == "deny",
            errnos=errnos,
            sa_source=SaSource(source),
            floor=floor == "xfrm-block",
            destroy=live_flows == "destroy",
        ),
        cgroups=tuple(gate.strings("cgroups")),
        host=gate.take("host", bool, False),
        vici=Path(gate.take("vici", str, str(DEFAULT_VICI))),
    )
    gate.finish(("mode", "default", "cgroups", "host", "vici", "sa_source", "live_flows", "floor"))
    if config.host and config.cgroups:
        raise gate.error("cgroups", "cannot be combined with gate.host = true")
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(trust.read(path, follow=True))
    except trust.UntrustedError as error:
        raise UsageError(str(error), hint=error.hint) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text: {error.reason}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, and what int() says of a number too long
        raise UsageError(f"{path}: {error}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _errnos(table: _Table) -> Errnos:
    default = Errnos()
    names = ("uncovered", "negotiating", "failed", "hold_timeout")
    chosen = {
        name: getattr(errno, table.choice(name, ERRNOS, errno.errorcode[getattr(default, name)]))
        for name in names
    }
    table.finish(names)
    return Errnos(**chosen)


def _policies(document: _Table, file: Path) -> list[tuple[Policy, Path]]:
    items = document.take("policy", list, [])
    return [
        (_policy(_Table(item, file, f"policy[{number}]")), file)
        for number, item in enumerate(items, 1)
    ]


def _policy(table: _Table) -> Policy:
    name = table.take("name", str, "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./@-]*", name):
        raise table.error("name", f"{short(name)} is not a name (letters, digits, _ . / @ -)")
    remote = tuple(table.parsed("remote", text, _network) for text in table.strings("remote"))
    if not remote:
        raise table.error("remote", "must name at least one network")
    proto = table.choice("protocol", ("any", "tcp", "udp"), "any")
    ports = table.parsed("port", table.take("port", str, "any"), _ports)
    if ports != (0, PORT_MASK) and proto == "any":
        raise table.error("port", 'needs protocol = "tcp" or "udp"')
    action = table.choice("action", ("protect", "bypass", "discard"), "protect")
    child = table.take("child", str, "")
    initiate = table.choice("initiate", ("on-demand", "start"), "on-demand")
    if action != "protect" and (child or initiate == "start"):
        raise table.error("child" if child else "initiate", 'needs action = "protect"')
    table.finish(("name", "remote", "protocol", "port", "action", "child", "initiate"))
    return Policy(
        name=name,
        remote=remote,
        action=Action[action.upper()],
        proto=PROTOCOLS[proto],
        ports=ports,
        child=child or None,
        start=initiate == "start",
    )


def _network(text: str) -> Network:
    if "%" in text:
        raise ValueError(f"{short(text)}: a network cannot name an interface")
    try:
        network = ip_network(text)
        mapped = IPv6Network("::ffff:0:0/96")
        if isinstance(network, IPv6Network) and network.subnet_of(mapped):
            # On the wire it is IPv4, through whatever socket it came.
            return IPv4Network((int(network[0]) & 0xFFFFFFFF, network.prefixlen - 96))
        return network
    except ValueError as error:
        raise ValueError(f"{short(text)}: {str(error)[:80]}") from error


def _ports(text: str) -> tuple[int, int]:
    if text == "any":
        return 0, PORT_MASK
    found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    if found is None:
        raise ValueError(f"{short(text)} is not a port, a range such as 5300-5307, or any")
    low = int(found[1])
    high = int(found[2] or low)
    if not 0 < low <= high <= PORT_MASK:
        raise ValueError(f"{text!r} is not within 1-{PORT_MASK}")
    return low, high


def _refuse_too_many(policies: list[tuple[Policy, Path]], path: Path) -> None:
    try:
        compile_table(policy_rules((policy for policy, _ in policies), {}))
    except TableFullError as error:
        raise UsageError(
            f"{path}: policy: {error}", hint="use fewer distinct prefix lengths and port ranges"
        ) from error


def _refuse_duplicates(policies: list[tuple[Policy, Path]]) -> None:
    seen: dict[str, Path] = {}
    for policy, file in policies:
        if policy.name in seen:
            raise UsageError(
                f"{file}: policy {policy.name!r}: the name is already used in {seen[policy.name]}"
            )
        seen[policy.name] = file
