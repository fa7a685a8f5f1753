"""The screens: one line each."""

from __future__ import annotations

from dataclasses import dataclass

BARE = "bare"
"""Nothing is loaded."""
LIVE = "live"
"""See `world.World`."""
NOBODY = "nobody"
"""The same, for a user who is not root."""
DEAD = "dead"
"""After the controller was killed."""
EDITED = "edited"
"""With a new controller, after a change of the configuration that was not reloaded."""
CHANGING = "changing"
"""Commands that change the gate, one after the other."""


@dataclass(frozen=True, slots=True)
class Screen:
    """A command to record. `seconds`: for one that does not end, when to look at it.

    `in_docs`: its picture is in docs/screens. `moves`: in time it has more lines, in any order.
    """

    name: str
    argv: tuple[str, ...]
    state: str = LIVE
    seconds: float | None = None
    in_docs: bool = False
    moves: bool = False


def _screen(
    name: str,
    command: str,
    state: str = LIVE,
    *,
    seconds: float | None = None,
    in_docs: bool = False,
    moves: bool = False,
) -> Screen:
    return Screen(name, tuple(command.split()), state, seconds, in_docs, moves)


SCREENS = (
    _screen("events", "events", in_docs=True, moves=True),
    _screen("events-last", "events --denied --last 2"),
    _screen("events-follow", "events --follow --denied", seconds=6),
    _screen("status", "status", in_docs=True, moves=True),
    _screen("status-brief", "status --brief"),
    _screen("policies", "policies", in_docs=True),
    _screen("sas", "sas", in_docs=True),
    _screen("flows", "flows", in_docs=True, moves=True),
    _screen("cgroups", "cgroups", in_docs=True),
    _screen("holds", "holds", in_docs=True),
    _screen("why-allowed", "why 10.2.0.5:5432", in_docs=True),
    _screen("why-refused", "why 10.3.0.7:443", in_docs=True),
    _screen("why-silent-peer", "why 10.4.0.9:443"),
    _screen("why-bypass", "why 10.2.0.53:53/udp"),
    _screen("why-never-asked", "why 10.5.0.3:6379"),
    _screen("why-last", "why"),
    _screen("top", "top", in_docs=True, moves=True, seconds=15),
    _screen("top-cgroups", "top --by cgroup", seconds=15),
    _screen("wait", "wait --policy db", in_docs=True),
    _screen("wait-timeout", "wait --policy billing --policy warehouse --timeout 2s", in_docs=True),
    _screen("wait-progress", "wait --policy warehouse", seconds=6),
    _screen("check", "check", in_docs=True),
    _screen("metrics", "metrics"),
    _screen("unit-dropin", "unit-dropin webshop"),
    _screen("policies-check", "policies --check /etc/ipsecgate/new.toml", in_docs=True),
    _screen("help", "--help"),
    _screen("help-verb", "why --help"),
    _screen("version", "--version"),
    _screen("bugtool", "bugtool"),
    _screen("error-unknown-unit", "attach unit:nosuch"),
    _screen("error-unknown-policy", "wait --policy nosuch"),
    _screen("error-usage", "why 10.2.0.5"),
    _screen("error-verb", "statsu"),
    _screen("error-config", "policies --check /etc/ipsecgate/broken.toml"),
    _screen("error-not-root", "status", NOBODY),
    _screen("reload-dry-run", "reload --dry-run", EDITED),
    _screen("wait-all", "wait --all --timeout 5s", CHANGING),
    _screen("reload", "reload", CHANGING),
    _screen("up", "up cache", CHANGING),
    _screen("up-wrong-key", "up billing --timeout 3s", CHANGING),
    _screen("down", "down cache", CHANGING),
    _screen("status-dead", "status", DEAD, in_docs=True, moves=True),
    _screen("policies-dead", "policies", DEAD),
    _screen("why-dead", "why 10.2.0.5:5432", DEAD),
    _screen("why-dead-no-source", "why 10.5.0.4:6379", DEAD),
    _screen("wait-dead", "wait --all --timeout 1s", DEAD),
    _screen("error-no-controller", "events", DEAD),
    _screen("status-bare", "status", BARE),
    _screen("check-bare", "check", BARE),
)
WIDTHS = (80, 140)
