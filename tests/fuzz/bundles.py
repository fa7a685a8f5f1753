"""The files of container runtimes that say what a container is called and where its cgroup is."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from ipsecgate.edges.host import container_targets, runtimes
from ipsecgate.edges.host.runtimes import Container, Places, Unread
from ipsecgate.errors import GateError
from tests.fuzz.engine import mutate_tree
from tests.fuzz.files import OTHERS, Folder

IDENT = "ab" * 32
KINDS = ("container:web", "label:tier=web", "label:tier", "pod:shop/*")


class Bundle(Folder):
    """A bundle's config.json, with what CRI-O adds."""

    name = "bundle"
    shaped = True
    refusals = (GateError,)
    words = (*Folder.words, b"..", b"/", b"::", b".slice", b'"annotations"', b'"cgroupsPath"')

    def __init__(self) -> None:
        super().__init__()
        self._path = self._folder / IDENT / "userdata/config.json"
        self._path.parent.mkdir(parents=True)

    def real(self, random: Random) -> tuple[bytes, Any]:
        labels = random.choice(({}, {"tier": "web"}, {"tier": "", "Ω": "x=y"}))
        in_pod = random.random() < 0.5
        annotations = {"io.kubernetes.cri-o.Labels": json.dumps(labels)}
        if in_pod:
            annotations |= {
                "io.kubernetes.pod.namespace": "shop",
                "io.kubernetes.pod.name": "web-1",
                "io.kubernetes.container.name": "web",
            }
        paths = {
            "/kubepods/podx/1": "kubepods/podx/1",
            "a-b.slice:crio:1": "a.slice/a-b.slice/crio-1.scope",
        }
        written, cgroup = random.choice(list(paths.items()))
        document = {"annotations": annotations, "linux": {"cgroupsPath": written}}
        meant = Container(
            IDENT, cgroup, frozenset(("web",) if in_pod else ()), {**annotations, **labels},
            "shop/web-1" if in_pod else "",
        )  # fmt: skip
        return json.dumps(document).encode(), [meant]

    def damaged(self, random: Random) -> bytes:
        tree = json.loads(self.real(random)[0])
        for _ in range(random.choice((1, 1, 2))):
            mutate_tree(random, tree, (*OTHERS, "/", "..", "a:b:c", "-.slice:a:b", "/../x", "::"))
        return json.dumps(tree).encode()

    def feed(self, data: bytes) -> Any:
        self._write(data)
        unread: Unread = {}
        none = self._folder / "none"
        places = Places(self._folder, self._folder, none, none, ())
        found = list(runtimes.containers(IDENT, places, unread))
        for container in found:
            parts = container.cgroup.split("/")
            assert parts == [part for part in parts if part not in ("", ".", "..")], "a path below"
            for target in KINDS:
                container_targets.named(target, container, Path("/x"))
            assert not (self._folder / container.cgroup / "cgroup.procs").is_file()
        if unread and not found:
            raise GateError("; ".join(unread.values()))
        return found
