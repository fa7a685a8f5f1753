"""The containers that run, from what their runtimes leave on disk.

    podman      conmon's command line: -c ID -n NAME -b BUNDLE; podman 5's labels are in a database
    CRI-O       /run/containers/storage/overlay-containers/ID/userdata is the bundle
    containerd  /run/containerd/io.containerd.runtime.v2.task/NAMESPACE/ID is the bundle
    Docker      uses containerd; name and labels: /var/lib/docker/containers/ID/config.v2.json

A bundle's config.json says where the container's cgroup is, and has annotations, which count as
labels. It is written before the cgroup is made, and Docker's file before that.

Rules of this module: no daemon or command is asked, because a runtime may hold its locks while it
starts the container. Only root's containers count: other users may give theirs any name.

Source: OCI runtime specification, config.md (annotations) and config-linux.md (cgroupsPath);
libpod/sqlite_state.go; pkg/cri/annotations of containerd; internal/annotations of CRI-O.
"""

from __future__ import annotations

import glob
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ipsecgate import trust
from ipsecgate.core.model.value import value
from ipsecgate.errors import GateError

ID = re.compile(r"[0-9a-f]{64}")
DATABASE = "db.sql"  # of podman 5
LIMIT = 16 << 20  # bytes of a file
NAME_MAX, PATH_MAX = 255, 4000  # bytes; Linux allows 4096 with the place of the hierarchy
PATIENCE = 1.0  # seconds for podman's database
NAMES = ("nerdctl/name", "io.kubernetes.cri.container-name", "io.kubernetes.container.name")
PODS = (
    ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.cri.sandbox-name"),
    ("io.kubernetes.pod.namespace", "io.kubernetes.pod.name"),
)
CRIO_LABELS, CRIO_SANDBOX = "io.kubernetes.cri-o.Labels", "io.kubernetes.cri-o.SandboxID"
Unread = dict[Path, str]
"""The files that cannot be read, each with the reason."""


@value
class Container:
    """A container as its runtime describes it.

    `cgroup`: relative to the root of the hierarchy. `pod`: NAMESPACE/NAME, "" outside Kubernetes.
    """

    ident: str
    cgroup: str
    names: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    pod: str = ""


@value
class Places:
    """Where the runtimes keep their state."""

    proc: Path = Path("/proc")
    crio: Path = Path("/run/containers/storage/overlay-containers")
    docker: Path = Path("/var/lib/docker/containers")
    podman: Path = Path("/var/lib/containers/storage")
    containerd: tuple[Path, ...] = tuple(
        Path(state, "io.containerd.runtime.v2.task")
        for state in ("/run/containerd", "/run/docker/containerd/daemon", "/run/k3s/containerd")
    )


PLACES = Places()


def containers(
    ident: str = "", places: Places | None = None, unread: Unread | None = None
) -> list[Container]:
    """Return the containers, or those with this id; one may be there more than once.

    The files that cannot be read are put into `unread`.
    """
    places = places or PLACES
    reader = _Reader({} if unread is None else unread)
    found = [*reader.containerd(places, ident), *reader.crio(places.crio, ident)]
    if not ident or ID.fullmatch(ident):
        found += reader.podman(places.proc, ident)
    return found


def is_podman_4(places: Places | None = None) -> bool:
    """Return whether podman keeps containers where their labels cannot be read."""
    folder = (places or PLACES).podman
    return (folder / "libpod/bolt_state.db").exists() and not (folder / DATABASE).exists()


def names(idents: Iterable[str]) -> dict[str, set[str]]:
    """Return the names of these containers, by id."""
    found: dict[str, set[str]] = defaultdict(set)
    for ident in set(idents):
        for container in containers(ident):
            found[ident] |= container.names
    return found


class _Reader:
    """Reads the runtimes' files. `unread`: those that it could not read, and why."""

    def __init__(self, unread: Unread) -> None:
        self._unread = unread

    def containerd(self, places: Places, ident: str) -> Iterator[Container]:
        pattern = f"*/{glob.escape(ident) or '*'}/config.json"
        for folder in places.containerd:
            for file in folder.glob(pattern):
                own = self._document(places.docker / file.parent.name / "config.v2.json")
                labels = _texts(_table(own, "Config").get("Labels"))
                yield from self._container(file, file.parent.name, own.get("Name"), labels)

    def crio(self, folder: Path, ident: str) -> Iterator[Container]:
        for file in folder.glob(f"{glob.escape(ident) or '*'}/userdata/config.json"):
            yield from self._container(file, file.parent.parent.name)

    def podman(self, proc: Path, ident: str) -> Iterator[Container]:
        for options in _conmon(proc):
            if options.keys() >= {"-c", "-n", "-b"} and ident in ("", options["-c"]):
                bundle = Path(options["-b"])
                labels = self._podman_labels(bundle, options["-c"])
                yield from self._container(
                    bundle / "config.json", options["-c"], options["-n"], labels
                )

    def _container(
        self, file: Path, ident: str, name: object = None, labels: Mapping[str, str] | None = None
    ) -> Iterator[Container]:
        """Yield the container of a bundle if it has a cgroup."""
        document = self._document(file)
        annotations = _texts(document.get("annotations"))
        cgroup = _cgroup(_table(document, "linux").get("cgroupsPath"))
        if not cgroup:
            return
        named = [name, *(annotations.get(key) for key in NAMES)]
        pods = (tuple(map(annotations.get, keys)) for keys in PODS)
        yield Container(
            ident,
            cgroup,
            frozenset(each.removeprefix("/") for each in named if isinstance(each, str)),
            {**annotations, **self._crio_labels(file, annotations), **(labels or {})},
            next((f"{space}/{pod}" for space, pod in pods if space and pod), ""),
        )

    def _crio_labels(self, file: Path, annotations: Mapping[str, str]) -> dict[str, str]:
        """Return the labels that CRI-O notes: those of the pod, which its sandbox has, included."""
        sandbox = annotations.get(CRIO_SANDBOX, "")
        above = {}
        if ID.fullmatch(sandbox):
            other = file.parents[2] / sandbox / "userdata/config.json"
            above = _texts(self._document(other).get("annotations"))
        texts = (each.get(CRIO_LABELS, "{}") for each in (above, annotations))
        return {
            key: value for text in texts for key, value in _texts(self._object(file, text)).items()
        }

    def _podman_labels(self, bundle: Path, ident: str) -> dict[str, str]:
        """Return the labels of a container of podman 5; version 4 has another kind of database."""
        # GRAPHROOT/DRIVER-containers/ID/userdata, and GRAPHROOT/db.sql
        file = Path(*bundle.parts[:-3], DATABASE) if len(bundle.parts) > 4 else Path()
        if not file.is_file():
            return {}
        import sqlite3  # noqa: PLC0415 - only podman 5 needs it

        query = "SELECT JSON FROM ContainerConfig WHERE ID = ?"
        try:
            trust.check(file)
            uri = f"file:{quote(str(file))}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True, timeout=PATIENCE)) as database:
                row = database.execute(query, (ident,)).fetchone()
        except (OSError, GateError, sqlite3.Error) as error:
            self._unread[file] = str(error)
            return {}
        return _texts(self._object(file, row[0]).get("labels")) if row else {}

    def _document(self, file: Path) -> dict[str, Any]:
        """Return what a file has, {} if it is gone, or cannot be read or trusted."""
        try:
            text = trust.read(file, limit=LIMIT)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, GateError, ValueError) as error:
            self._unread[file] = str(error)
            return {}
        return self._object(file, text)

    def _object(self, file: Path, text: object) -> dict[str, Any]:
        """Return a JSON object of a file, {} if the text is none. podman 5 writes it as a BLOB."""
        try:
            document = json.loads(text) if isinstance(text, str | bytes) else None
        except (ValueError, RecursionError) as error:
            self._unread[file] = str(error)
            return {}
        if not isinstance(document, dict):
            self._unread[file] = "not a JSON object"
            return {}
        return document


def _conmon(proc: Path) -> Iterator[dict[str, str]]:
    """Yield the options of podman's and CRI-O's monitors.

    Each is a process of this name, as root, and not in a PID namespace of its own: a container's
    process may have any name.
    """
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            if process.stat().st_uid or (process / "comm").read_bytes() != b"conmon\n":
                continue
            nested = re.search(rb"^NSpid:\t\d+\t", (process / "status").read_bytes(), re.MULTILINE)
            if not nested:
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                yield dict(pairwise(words))
        except OSError:
            continue  # it has ended


def _cgroup(path: object) -> str:
    """Return a cgroup below the root, as a/b, from a bundle's cgroupsPath; "" if there is none.

    It is a path, or SLICE:PREFIX:NAME, which systemd makes SLICE/PREFIX-NAME.scope.
    """
    if not isinstance(path, str) or not path.isprintable() or len(path) > PATH_MAX:
        return ""
    parts = path.split(":")
    if len(parts) == 3:
        above, prefix, name = parts
        unit = f"{prefix}-{name}" if prefix else name
        path = f"{_slices(above or 'system.slice')}/{unit}.scope"
    parts = [part for part in path.split("/") if part not in ("", ".")]
    found = "/".join(parts)
    too_long = len(found.encode()) > PATH_MAX or any(len(one.encode()) > NAME_MAX for one in parts)
    return "" if too_long or ".." in parts else found


def _slices(name: str) -> str:
    """Return the path of a slice: a-b.slice is in a.slice. Source: systemd.slice(5)."""
    parts = name.removesuffix(".slice").split("-")
    if not any(parts):
        return ""  # -.slice is the root
    return "/".join("-".join(parts[: count + 1]) + ".slice" for count in range(len(parts)))


def _table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _texts(value: object) -> dict[str, str]:
    """Return the strings of a JSON object, {} if it is none."""
    if not isinstance(value, dict):
        return {}
    return {key: text for key, text in value.items() if isinstance(text, str)}
