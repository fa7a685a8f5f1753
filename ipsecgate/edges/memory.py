"""Keep on disk which flows must be protected where only IKE's connections say so.

A gate that starts before the IKE daemon, or after it lost its connections, is
not open because of this file. A broken one is an error, never an empty set.
"""

from __future__ import annotations

import json
import os
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from ipsecgate.core.events import ChildConfig
from ipsecgate.core.flow import TrafficSelector
from ipsecgate.core.ipsec import Mode
from ipsecgate.errors import GateError


def recall(path: Path) -> tuple[ChildConfig, ...]:
    """Return what was kept, nothing if nothing ever was. Raises: GateError."""
    try:
        items = json.loads(path.read_text())
        return tuple(_child(item) for item in items)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GateError(
            f"{path}: cannot read which flows must be protected: {error}",
            hint="name them as [[policy]] in the configuration, or remove the file "
            "while the IKE daemon has its connections loaded",
        ) from error


def keep(path: Path, children: tuple[ChildConfig, ...]) -> None:
    """Replace what is kept, whole or not at all. Raises: OSError."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    try:
        with aside.open("w") as file:
            json.dump([_plain(child) for child in children], file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # a full disk needs the room
        raise


def _plain(child: ChildConfig) -> dict[str, Any]:
    def side(selectors: tuple[TrafficSelector, ...]) -> list[list[Any]]:
        return [[str(s.network), s.proto, *s.ports] for s in selectors]

    return {
        "ike": child.ike,
        "child": child.child,
        "mode": child.mode.name,
        "local": side(child.local),
        "remote": side(child.remote),
    }


def _child(item: dict[str, Any]) -> ChildConfig:
    def side(selectors: list[Any]) -> tuple[TrafficSelector, ...]:
        return tuple(
            TrafficSelector(ip_network(network), int(proto), (int(low), int(high)))
            for network, proto, low, high in selectors
        )

    return ChildConfig(
        ike=str(item["ike"]),
        child=str(item["child"]),
        mode=Mode[item["mode"]],
        local=side(item["local"]),
        remote=side(item["remote"]),
    )
