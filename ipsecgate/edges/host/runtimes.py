"""The names that people gave to containers, by container id, from what the runtimes leave on disk.

    podman, CRI-O   conmon's command line: -c ID -n NAME
    Docker          /var/lib/docker/containers/ID/config.v2.json, written before a container starts
    containerd      the annotations in the bundle's config.json (Kubernetes, nerdctl)

Rules of this module: no daemon or command is asked, because a runtime may hold its locks while it
starts the container. Only root's containers count: other users may give theirs any name.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ipsecgate import trust
from ipsecgate.errors import GateError

ID = re.compile(r"[0-9a-f]{64}")
NAMES_IN_ANNOTATIONS = ("nerdctl/name", "io.kubernetes.cri.container-name")


@dataclass(frozen=True, slots=True)
class Places:
    """Where the runtimes keep their state."""

    proc: Path = Path("/proc")
    docker: Path = Path("/var/lib/docker/containers")
    containerd: Path = Path("/run/containerd/io.containerd.runtime.v2.task")


def names(places: Places = Places()) -> dict[str, set[str]]:
    """Return the names of the containers that exist, by id."""
    found: dict[str, set[str]] = defaultdict(set)
    for source in (_conmon(places.proc), _docker(places.docker), _containerd(places.containerd)):
        for ident, name in source:
            if ID.fullmatch(ident):
                found[ident].add(name)
    return found


def _conmon(proc: Path) -> Iterator[tuple[str, str]]:
    """Yield the containers of podman and CRI-O: each has a process of this name, as root."""
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):  # it has ended
            if process.stat().st_uid or (process / "comm").read_text() != "conmon\n":
                continue
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            options = dict(pairwise(words))
            if "-c" in options and "-n" in options:
                yield options["-c"], options["-n"]


def _docker(folder: Path) -> Iterator[tuple[str, str]]:
    for file in folder.glob("*/config.v2.json"):
        name = _document(file).get("Name")
        if isinstance(name, str):
            yield file.parent.name, name.removeprefix("/")


def _containerd(folder: Path) -> Iterator[tuple[str, str]]:
    for file in folder.glob("*/*/config.json"):
        annotations = _document(file).get("annotations")
        for key in NAMES_IN_ANNOTATIONS:
            if isinstance(annotations, dict) and isinstance(annotations.get(key), str):
                yield file.parent.name, annotations[key]


def _document(file: Path) -> dict[str, object]:
    """Return a JSON object, {} if the file is not trusted, incomplete or gone."""
    with suppress(OSError, GateError, ValueError, RecursionError):
        document = json.loads(trust.read(file))
        if isinstance(document, dict):
            return document
    return {}
