"""Keep on disk what must not be forgotten: IKE's connections, and which cgroups are gated.

A gate that starts before the IKE daemon, or after it lost its connections, is not open
because of the first file; one that boots with a broken configuration is not because of
the second. A broken file is an error, never an empty set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

from ipsecgate import trust
from ipsecgate.core.codec.vici import OPAQUE
from ipsecgate.core.model.flow import PORT_MASK, TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, Mode
from ipsecgate.errors import GateError

T = TypeVar("T")


def recall(path: Path) -> tuple[ChildConfig, ...]:
    """Return what was kept, nothing if nothing ever was. Raises: GateError."""
    try:
        items = _the(list, json.loads(trust.read(path)))
        return tuple(_child(_the(dict, item)) for item in items)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise GateError(
            f"{path}: cannot read which flows must be protected: {error}",
            hint="add a [[policy]] for each to the configuration, or remove the file while "
            "strongSwan has its connections loaded",
        ) from error


def keep(path: Path, children: tuple[ChildConfig, ...]) -> None:
    """Replace what is kept, whole or not at all. Raises: OSError."""
    _write(path, [_plain(child) for child in children])


def recall_targets(path: Path) -> tuple[str, ...]:
    """Return the targets that were kept, nothing if none ever were. Raises: GateError."""
    try:
        return tuple(_the(str, item) for item in _the(list, json.loads(trust.read(path))))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise GateError(
            f"{path}: cannot read which cgroups are gated: {error}",
            hint="correct the configuration, which names them",
        ) from error


def keep_targets(path: Path, targets: tuple[str, ...]) -> None:
    """Replace the targets that are kept, whole or not at all. Raises: OSError."""
    _write(path, targets)


def _write(path: Path, items: Sequence[Any]) -> None:
    trust.folder(path.parent)
    aside = path.with_suffix(".new")
    try:
        with aside.open("w") as file:
            json.dump(items, file, indent=1)
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
        "ike": child.name.ike,
        "child": child.name.child,
        "mode": child.mode.name,
        "local": side(child.local),
        "remote": side(child.remote),
    }


def _child(item: dict[str, Any]) -> ChildConfig:
    return ChildConfig(
        name=ChildName(_name(item["ike"]), _name(item["child"])),
        mode=Mode[_the(str, item["mode"])],
        local=tuple(_selector(_the(list, one)) for one in _the(list, item["local"])),
        remote=tuple(_selector(_the(list, one)) for one in _the(list, item["remote"])),
    )


def _selector(item: list[Any]) -> TrafficSelector:
    network, *numbers = item
    proto, low, high = (_the(int, number) for number in numbers)
    if not 0 <= proto <= 0xFF:
        raise ValueError(f"protocol {short(proto)}")
    # A range that is empty would be taken for "no flow has this", and left out.
    if (low, high) != OPAQUE and not 0 <= low <= high <= PORT_MASK:
        raise ValueError(f"ports {short(low)}-{short(high)}")
    return TrafficSelector(ip_network(_the(str, network)), proto, (low, high))


def _name(value: object) -> str:
    name = _the(str, value)
    name.encode()  # refuses half of a surrogate pair, which JSON can hold
    return name


def _the(kind: type[T], value: object) -> T:
    """Return a value that is of this kind and no other: 0 is not False, {} is not []."""
    if type(value) is not kind:
        raise ValueError(f"{short(value)} is no {kind.__name__}")
    return value
