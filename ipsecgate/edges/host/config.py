"""Read ipsecgate.toml and policies.d/*.toml.

Rule of this module: a configuration is accepted as a whole or rejected as a whole. Nothing is
changed here.
"""

from __future__ import annotations

import errno
import re
import tomllib
from collections.abc import Sequence
from dataclasses import field
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ipsecgate import trust
from ipsecgate.core.model.flow import PORT_MASK, PROTOCOLS, Network
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Errnos, Policy, SaSource, Settings
from ipsecgate.core.model.value import value
from ipsecgate.core.tables.policy_rules import matches
from ipsecgate.core.tables.rule_table import COARSE_ENTRIES, COARSE_MASKS, ENTRY_LIMIT, MASK_LIMIT
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.host.config_keys import SECTIONS
from ipsecgate.edges.host.config_table import TomlTable
from ipsecgate.edges.host.listen import Listen
from ipsecgate.errors import UsageError

DEFAULT_VICI = Path(str(SECTIONS["gate"].keys["vici"].default))
DEFAULT_LISTEN = Listen("127.0.0.1", 9765)
_POLICY = re.compile(r"\s*\[\[\s*policy\s*\]\]")


@value
class Config:
    """One instance's configuration.

    `cgroups` has targets as written (see `edges/host/cgroups.py`). `host`: gate all cgroups.
    `listen`: where metrics are served, None: not configured.
    """

    settings: Settings = field(default_factory=Settings)
    cgroups: tuple[str, ...] = ()
    host: bool = False
    vici: Path = DEFAULT_VICI
    listen: Listen | None = None


def load(path: Path, *, required: bool = True) -> Config:
    """Read a configuration file and the policies.d folder beside it.

    If the file is missing and not `required`, return the defaults. Raises: UsageError.
    """
    if not required and not path.exists():
        return Config()
    document, lines = _document(path)
    gate = TomlTable(document.section("gate", dict, {}), path, "gate")
    errnos = _errnos(TomlTable(document.section("errno", dict, {}), path, "errno"))
    listen = _listen(TomlTable(document.section("metrics", dict, {}), path, "metrics"))
    tables = _policy_tables(document, lines)
    document.finish(SECTIONS)
    for extra in sorted((path.parent / "policies.d").glob("*.toml")):
        document, lines = _document(extra)
        tables += _policy_tables(document, lines)
        document.finish(("policy",))
    policies = _policies(tables)
    _refuse_too_many(policies, path)
    return _config(gate, errnos, listen, policies)


def _config(
    gate: TomlTable, errnos: Errnos, listen: Listen | None, policies: tuple[Policy, ...]
) -> Config:
    host = gate.flag("host")
    # With the whole host gated, what the kernel sends on its own must be protected, too.
    floor = gate.choice("floor", "xfrm-block" if host else None)
    config = Config(
        settings=Settings(
            policies=policies,
            audit=gate.choice("mode") == "audit",
            deny=gate.choice("default") == "deny",
            errnos=errnos,
            sa_source=SaSource(gate.choice("sa_source")),
            floor=floor == "xfrm-block",
            destroy=gate.choice("live_flows") == "destroy",
        ),
        cgroups=tuple(
            gate.parsed("cgroups", text, cgroups.checked) for text in gate.strings("cgroups")
        ),
        host=host,
        vici=Path(gate.text("vici")),
        listen=listen,
    )
    gate.finish()
    if config.host and config.cgroups:
        raise gate.error(
            "cgroups",
            "cannot be combined with gate.host = true, which gates every cgroup",
            "remove one of the two",
        )
    return config


def _document(path: Path) -> tuple[TomlTable, list[int]]:
    """Return a file's top table, and the lines at which its policies begin."""
    text = _read(path)
    return TomlTable(_parse(path, text), path, ""), [
        number for number, line in enumerate(text.splitlines(), 1) if _POLICY.match(line)
    ]


def _read(path: Path) -> str:
    try:
        return trust.read(path, follow=True)
    except trust.UntrustedError as error:
        raise UsageError(str(error), hint=error.hint) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 text: {error.reason} at byte {error.start}",
            hint="save the file as UTF-8",
        ) from error
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: {error.strerror}", hint="create it, or name another file with --config"
        ) from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, or int() of too many digits
        raise UsageError(
            f"{path}: not valid TOML: {error}",
            hint='a key is written like mode = "enforce", with quotes around every string',
        ) from error


def _errnos(table: TomlTable) -> Errnos:
    chosen = {key: getattr(errno, table.choice(key)) for key in table.keys}
    table.finish()
    return Errnos(**chosen)


def _listen(table: TomlTable) -> Listen | None:
    text = table.text("listen")
    table.finish()
    return table.parsed("listen", text, Listen.parse) if text else None


def _policy_tables(document: TomlTable, lines: Sequence[int]) -> list[TomlTable]:
    items = document.section("policy", list, [])
    if len(lines) != len(items):
        lines = [0] * len(items)  # written in another way, so the lines are not known
    return [
        TomlTable(item, document.file, f"policy[{number}]", line)
        for number, (item, line) in enumerate(zip(items, lines, strict=True), 1)
    ]


def _policies(tables: Sequence[TomlTable]) -> tuple[Policy, ...]:
    """Raises: UsageError for the first table that is wrong, or has the name of an earlier one."""
    policies: dict[str, Policy] = {}
    places: dict[str, TomlTable] = {}
    for table in tables:
        policy = _policy(table)
        if policy.name in policies:
            first = places[policy.name]
            raise table.error(
                "name",
                f"{policy.name!r} is already the name of {first.name} in {first.file}",
                "give each policy a name of its own",
            )
        policies[policy.name] = policy
        places[policy.name] = table
    return tuple(policies.values())


def _policy(table: TomlTable) -> Policy:
    name = table.text("name")
    if not name:
        raise table.error("name", "missing: every policy needs a name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./@-]*", name):
        raise table.error(
            "name",
            f"{short(name)} is not a name: it must begin with a letter or digit, and may contain "
            "letters, digits and _ . / @ -",
        )
    remote = tuple(table.parsed("remote", text, _network) for text in table.strings("remote"))
    if not remote:
        raise table.error("remote", "missing: every policy needs at least one network")
    proto = table.choice("protocol")
    ports = table.parsed("port", table.text("port"), _ports)
    if ports != (0, PORT_MASK) and proto == "any":
        raise table.error(
            "port",
            'needs protocol = "tcp" or protocol = "udp"',
            'add protocol = "tcp", for example',
        )
    action = table.choice("action")
    child = table.text("child")
    initiate = table.choice("initiate")
    if action != "protect" and (child or initiate == "start"):
        raise table.error(
            "child" if child else "initiate",
            f'has no effect with action = "{action}"',
            'remove it, or set action = "protect"',
        )
    table.finish()
    return Policy(
        name=name,
        remote=remote,
        action=Action[action.upper()],
        proto=PROTOCOLS[proto],
        ports=ports,
        child=child or None,
        start=initiate == "start",
        origin=table.origin,
    )


def _network(text: str) -> Network:
    if "%" in text:
        raise ValueError(f"{short(text)}: a network cannot name an interface")
    try:
        network = ip_network(text, strict=False)
    except ValueError as error:
        raise ValueError(f"{short(text)} is not an IPv4 or IPv6 network") from error
    try:
        ip_network(text)
    except ValueError as error:
        raise ValueError(f"{short(text)} has host bits set: write {str(network)!r}") from error
    if isinstance(network, IPv6Network) and network.subnet_of(IPv6Network("::ffff:0:0/96")):
        # On the wire it is IPv4, whichever socket sends it.
        return IPv4Network((int(network[0]) & 0xFFFFFFFF, network.prefixlen - 96))
    return network


def _ports(text: str) -> tuple[int, int]:
    if text == "any":
        return 0, PORT_MASK
    found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    if found is None:
        raise ValueError(f'{short(text)} is not a port, a range such as 5300-5307, or "any"')
    low = int(found[1])
    high = int(found[2] or low)
    if low > high:
        raise ValueError(f"{text!r} is an empty range: {low} is greater than {high}")
    if not 0 < low <= high <= PORT_MASK:
        raise ValueError(f"{text!r} is not within 1-{PORT_MASK}")
    return low, high


def _refuse_too_many(policies: Sequence[Policy], path: Path) -> None:
    found = [match for policy in policies for match in matches(policy)]
    masks = len({match.mask for match in found})
    most_masks, most_entries = MASK_LIMIT - COARSE_MASKS, ENTRY_LIMIT - COARSE_ENTRIES
    if masks <= most_masks and len(found) <= most_entries:
        return
    raise UsageError(
        f"{path}: policy: {masks} distinct masks and {len(found)} entries; the hooks hold "
        f"{most_masks} and {most_entries}",
        hint="use fewer different prefix lengths and port ranges: each combination of them, "
        "with the protocol, needs a mask of its own",
    )
