"""Every key of the configuration: its type, default and meaning, and how one writes it.

The parser, its errors, ipsecgate.toml(5) and the reference in docs/operating.md all read this list.
In a text, `backticks` mark what one types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from errno import errorcode

from ipsecgate.core.model.policy import Errnos
from ipsecgate.core.model.value import value

Value = str | bool | tuple[str, ...]

# Errors that the clients we measured report as a plain failure. EAGAIN only on request, because it
# makes some clients believe that they are connected. Never EINTR or EINPROGRESS.
ERRNOS = (
    "EPERM",
    "EACCES",
    "ECONNREFUSED",
    "EHOSTUNREACH",
    "ENETUNREACH",
    "ETIMEDOUT",
    "EAGAIN",
)


@value
class Key:
    """One key of a table.

    `default`: its type is the key's type. `values`: what one can write, in words, without a text if
    these are the `choices`. `required`: it has no default. `unset`: what the default means, if it
    does not say so itself. `example`: another value than the default, as one might write it.
    """

    name: str
    default: Value
    meaning: str
    choices: tuple[str, ...] = ()
    values: str = ""
    example: Value | None = None
    required: bool = False
    unset: str = ""

    @property
    def hint(self) -> str:
        """How to write it, for an error that has no better hint."""
        value = self.default if self.example is None else self.example
        return f"for example: {self.name} = {toml(value)}"


@value
class Section:
    """One table of the configuration, or an array of tables."""

    heading: str
    meaning: str
    keys: Mapping[str, Key]
    hint: str


def toml(value: Value) -> str:
    """Return a value as one writes it in TOML."""
    return json.dumps(value)  # the same for strings, booleans and lists


def _section(heading: str, meaning: str, hint: str, *keys: Key) -> Section:
    return Section(heading, meaning, {key.name: key for key in keys}, hint)


def _errno(state: str, meaning: str) -> Key:
    return Key(state, errorcode[getattr(Errnos(), state)], meaning, ERRNOS, "error name")


SECTIONS: Mapping[str, Section] = {
    "gate": _section(
        "[gate]",
        "What the gate does, and which processes it gates.",
        "write a line [gate], and its keys below it",
        Key(
            "mode",
            "enforce",
            "`enforce` refuses what must be protected and is not. `audit` counts and reports it, "
            "and refuses nothing.",
            ("enforce", "audit"),
        ),
        Key(
            "default",
            "allow",
            "What happens to flows that match no policy.",
            ("allow", "deny"),
        ),
        Key(
            "cgroups",
            (),
            "The cgroups to gate, each with all cgroups below it: `unit:NAME` for a systemd unit, "
            "`container:NAME` for a container by its name or id, `label:KEY=VALUE` for containers "
            "by a label, `pod:NAMESPACE/NAME` for pods of Kubernetes, or the path of a cgroup. "
            "The controller waits for those that do not exist yet.",
            values="list of strings",
            example=("unit:webshop", "/sys/fs/cgroup/web"),
        ),
        Key(
            "host",
            False,
            "Gate every cgroup of the host. It cannot be combined with `cgroups`.",
            values="true or false",
            example=True,
        ),
        Key(
            "vici",
            "/run/charon.vici",
            "The socket of strongSwan. After a change, restart the controller.",
            values="path",
        ),
        Key(
            "sa_source",
            "auto",
            "Where to read which SAs are live: `xfrm` asks the kernel; `vici` asks strongSwan, "
            "where it does ESP itself; with `auto`, strongSwan says which. After a change, restart "
            "the controller.",
            ("auto", "xfrm", "vici"),
        ),
        Key(
            "live_flows",
            "block",
            "What happens to established connections when their last SA goes: `block` stops their "
            "packets until the next SA; `destroy` closes their sockets.",
            ("block", "destroy"),
        ),
        Key(
            "floor",
            "none",
            "`xfrm-block` also blocks unprotected packets from outside the gated cgroups.",
            ("none", "xfrm-block"),
            unset='`"none"`; with `host = true`, `"xfrm-block"`',
        ),
    ),
    "errno": _section(
        "[errno]",
        f"The error that a refused call returns: {', '.join(ERRNOS[:-1])} or {ERRNOS[-1]}. After "
        "EAGAIN some clients believe that they are connected.",
        "write a line [errno], and its keys below it",
        _errno("uncovered", "No SA protects the flow, and none is being negotiated yet."),
        _errno("negotiating", "An SA is being negotiated."),
        _errno("failed", "The negotiation failed, and will be tried again."),
        _errno("hold_timeout", "A held call reached its limit."),
    ),
    "metrics": _section(
        "[metrics]",
        "Where `ipsecgate metrics --listen` and its unit serve Prometheus.",
        "write a line [metrics], and its keys below it",
        Key(
            "listen",
            "",
            "The address, which should be one that only your Prometheus can reach.",
            values="ADDRESS:PORT or unix:PATH",
            example="unix:/run/ipsecgate/metrics.sock",
            unset="127.0.0.1:9765",
        ),
    ),
    "policy": _section(
        "[[policy]]",
        "One for each policy. The first that matches a flow decides about it.",
        "write a line [[policy]] for each policy, and its keys below it",
        Key(
            "name",
            "",
            "What status, events and errors call it. It begins with a letter or digit, and may "
            "contain letters, digits and `_ . / @ -`.",
            values="string",
            example="db",
            required=True,
        ),
        Key(
            "remote",
            (),
            "The networks, IPv4 or IPv6, to which the flows go.",
            values="list of networks",
            example=("10.2.0.0/16", "2001:db8:2::/48"),
            required=True,
        ),
        Key("protocol", "any", "The protocol of the flows.", ("any", "tcp", "udp"), example="tcp"),
        Key(
            "port",
            "any",
            'The port to which the flows go: one such as `"5432"`, a range such as `"5300-5307"`, '
            'or `"any"`. One port or a range needs `protocol`.',
            values="string",
            example="5432",
        ),
        Key(
            "action",
            "protect",
            "`protect` lets a flow go only while an SA protects it, `bypass` always, `discard` "
            "never.",
            ("protect", "bypass", "discard"),
        ),
        Key(
            "child",
            "",
            "The child of strongSwan's connections that is to protect the flows: its name, or "
            "`CONNECTION/CHILD`.",
            values="string",
            example="net-net",
            unset="found by traffic selector",
        ),
        Key(
            "initiate",
            "on-demand",
            "When to negotiate: `on-demand` at the first flow, `start` as soon as strongSwan runs.",
            ("on-demand", "start"),
        ),
    ),
}
