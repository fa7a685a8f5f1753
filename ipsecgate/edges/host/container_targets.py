"""Targets that name containers: container:NAME, label:KEY=VALUE and pod:NAMESPACE/NAME.

Rule of this module: a container is one that `runtimes` found. A cgroup that only has the name of
one counts for nothing, because users may make cgroups of any name below theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ipsecgate.edges.host import runtimes
from ipsecgate.edges.host.runtimes import Container

KINDS = ("container:", "label:", "pod:")
SHORT_ID = 6  # digits of a container's id that name it
_POD = re.compile(r"[a-z0-9-]+/[a-z0-9.*?!\[\]-]+")
# The kubelet names a pod's cgroup after its UID; that of a static pod has no hyphens.
_POD_CGROUP = re.compile(r"(?:.+-)?pod[0-9a-f_-]{32,36}(?:\.slice)?")
_OWN_LABELS = ("io.container.", "io.kubernetes.", "io.podman.", "nerdctl/", "org.opencontainers.")
"""How the labels begin that runtimes make for themselves."""


def check(target: str) -> None:
    """Raises: ValueError if a target of these kinds is malformed."""
    kind, _, name = target.partition(":")
    if kind == "label" and name.startswith("="):
        raise ValueError(f"{target!r} has no key: write label:KEY=VALUE or label:KEY")
    if kind == "pod" and not _POD.fullmatch(name):
        raise ValueError(
            f"{target!r} is not a pod: write pod:NAMESPACE/NAME, where only NAME may have wildcards"
        )


def named(target: str, container: Container, cgroup: Path) -> Path | None:
    """Return the cgroup that a target names because of a container, None if there is none.

    It is the container's own, which is given, or its pod's.
    """
    kind, _, name = target.partition(":")
    match kind:
        case "container" if _is_called(name, container):
            return cgroup
        case "label" if _has_label(name, container):
            return cgroup
        case "pod" if fnmatchcase(container.pod, name):
            return cgroup.parent if _POD_CGROUP.fullmatch(cgroup.parent.name) else cgroup
    return None


def _is_called(name: str, container: Container) -> bool:
    ident = container.ident
    if name == ident or name in container.names:
        return True
    return len(name) >= SHORT_ID and bool(runtimes.ID.fullmatch(ident)) and ident.startswith(name)


def _has_label(label: str, container: Container) -> bool:
    key, equals, value = label.partition("=")
    return key in container.labels and (not equals or container.labels[key] == value)


def absence(target: str) -> str:
    """Return why a target of these kinds names no cgroup: a sentence without its end."""
    kind, _, name = target.partition(":")
    if kind == "label":
        annotation = name if "=" in name else f"{name}=VALUE"
        hint = (
            f" (podman 4 keeps labels in its database: use --annotation {annotation} or "
            "container:NAME)"
        )
        return f"{target} is on no running container{hint if runtimes.is_podman_4() else ''}"
    if kind == "pod":
        return f"{target} is not running here, or neither containerd nor CRI-O knows such a pod"
    return (
        f"{target} is not running, or neither podman, CRI-O, Docker nor containerd knows it by "
        "that name"
    )


def descriptions(container: Container) -> Iterator[str]:
    """Yield the targets that name a container by a label that people gave it, or by its pod."""
    for key, value in container.labels.items():
        if not key.startswith(_OWN_LABELS):
            yield f"label:{key}={value}" if value else f"label:{key}"
    if container.pod:
        yield f"pod:{container.pod}"
