"""What a candidate configuration would change, drawn as tables."""

from __future__ import annotations

from ipaddress import ip_network

from rich.console import Group, RenderableType
from rich.text import Text

from ipsecgate.admin.documents import Change, Difference
from ipsecgate.cli.tables import coloured, first, heading, left_out, lines, number, table
from ipsecgate.core.model.prefixes import in_words

_TITLES = {
    "opens": "Would open",
    "closes": "Would close",
    "changes": "Would be protected by another child",
}


def screen(document: Difference, *, everything: bool) -> RenderableType:
    """Draw the document, whose texts are printable."""
    parts: list[RenderableType] = [_headline(document)]
    for kind, title in _TITLES.items():
        changes = [one for one in document["policies"] if one["kind"] == kind]
        if not changes:
            continue
        rows = table("Flows to", "Port", "Now", "Then")
        for one in first(changes, everything=everything):
            rows.add_row(
                lines(_networks(one), everything=everything), _ports(one),
                _by(one["before"], one["old_policy"]), _by(one["after"], one["new_policy"]),
            )  # fmt: skip
        needs_sa = kind == "closes" and any("protect" in one["after"] for one in changes)
        effect = "; what is under `protect` then is refused unless a live SA covers it" * needs_sa
        parts += [heading(title + effect), rows, *left_out(changes, everything=everything)]
    if document["settings"]:
        rows = table("Setting", "Now", "Then", "Effect")
        for each in document["settings"]:
            text = Text.assemble(coloured(each["kind"]), f": {each['text']}")
            rows.add_row(each["key"], each["before"] or "-", each["after"] or "-", text)
        parts += [heading("Settings"), rows]
    if touched := document["touched"]:
        rows = table("Alive now", "Flow or SPI", "Cgroup, thread or peer", "Effect")
        for live in first(touched, everything=everything):
            rows.add_row(live["what"], live["name"], live["where"], coloured(live["kind"]))
        parts += [heading("Touches"), rows, *left_out(touched, everything=everything)]
    return Group(*parts)


def _headline(document: Difference) -> Text:
    against = "what is in force"
    if document["compared_with"] == "configured":
        against = "what is configured, because the controller is not running"
    kinds = [kind for kind in ("opens", "closes") if document[kind]]
    effect = " and ".join(kinds) + " flows" if kinds else "opens and closes nothing"
    colour = "bold red" if document["opens"] else "yellow" if kinds else "green"
    touched = document["touched"]
    live = f"; touches {number(len(touched), 'live flow, call or SA', 'live flows, calls or SAs')}"
    return Text.assemble(
        f"{document['candidate']} ", (effect, colour), f", compared with {against}",
        live * bool(touched), ". Nothing was changed.",
    )  # fmt: skip


def _ports(one: Change) -> str:
    port = one["protocol"] if one["port"] == "any" else f"{one['protocol']} {one['port']}"
    return port if one["local_port"] == "any" else f"{port}\nfrom {one['local_port']}"


def _networks(one: Change) -> list[str]:
    return in_words(map(ip_network, one["remote"]))


def _by(effect: str, policy: str | None) -> str:
    return f"{effect} by {policy}" if policy else f"{effect}, no policy"
