"""Two files that keep the gate closed after a restart: IKE's child configurations, and targets.

The child configurations say which flows need protection when the gate starts before the IKE daemon,
or after the daemon has lost its connections. The targets say which cgroups to gate at boot if the
configuration is broken. A file that cannot be read is an error; it never counts as empty.
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
from ipsecgate.core.model.flow import OPAQUE, PORT_MASK, TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, Mode
from ipsecgate.errors import GateError

T = TypeVar("T")


def load_children(path: Path) -> tuple[ChildConfig, ...]:
    """Return the saved child configurations, none if the file does not exist. Raises: GateError."""
    try:
        items = _exactly(list, json.loads(trust.read(path)))
        return tuple(_child(_exactly(dict, item)) for item in items)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise GateError(
            f"{path}: cannot read which flows must be protected: {error}",
            hint="load all of strongSwan's connections, then remove the file and start the "
            "controller, which writes a new one; what is not loaded then is not protected any more",
        ) from error


def save_children(path: Path, children: tuple[ChildConfig, ...]) -> None:
    """Replace the saved child configurations atomically. Raises: OSError."""
    _write(path, [_plain(child) for child in children])


def load_targets(path: Path) -> tuple[str, ...]:
    """Return the saved targets, none if the file does not exist. Raises: GateError."""
    try:
        return tuple(_exactly(str, item) for item in _exactly(list, json.loads(trust.read(path))))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise GateError(
            f"{path}: cannot read which cgroups are gated: {error}",
            hint="correct the configuration: gate.cgroups in it names them",
        ) from error


def save_targets(path: Path, targets: tuple[str, ...]) -> None:
    """Replace the saved targets atomically. Raises: OSError."""
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
        aside.unlink(missing_ok=True)  # leave no remains on a full disk
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
        mode=Mode[_exactly(str, item["mode"])],
        local=tuple(_selector(_exactly(list, one)) for one in _exactly(list, item["local"])),
        remote=tuple(_selector(_exactly(list, one)) for one in _exactly(list, item["remote"])),
    )


def _selector(item: list[Any]) -> TrafficSelector:
    network, *numbers = item
    proto, low, high = (_exactly(int, number) for number in numbers)
    if not 0 <= proto <= 0xFF:
        raise ValueError(f"invalid protocol {short(proto)}")
    # An empty range would match no flow, so the child would protect nothing.
    if (low, high) != OPAQUE and not 0 <= low <= high <= PORT_MASK:
        raise ValueError(f"invalid ports {short(low)}-{short(high)}")
    return TrafficSelector(ip_network(_exactly(str, network)), proto, (low, high))


def _name(value: object) -> str:
    name = _exactly(str, value)
    name.encode()  # raises for a lone surrogate, which JSON can express
    return name


def _exactly(kind: type[T], value: object) -> T:
    """Return a value of exactly this type: False does not count as 0. Raises: ValueError."""
    if type(value) is not kind:
        raise ValueError(f"{short(value)} is not a {kind.__name__}")
    return value
