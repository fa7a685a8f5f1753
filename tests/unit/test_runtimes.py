"""Containers by name, label and pod, from files as the runtimes write them."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.edges.host import cgroups, container_targets, runtimes
from ipsecgate.edges.host.runtimes import Container, Places, Unread

ID, OTHER, SANDBOX = "0123456789abcdef" * 4, "fedcba9876543210" * 4, "ab" * 32
UID = "6a1c5f0e-9a55-4b0c-8d6e-0c7b1f3a9e21"
SCHEMA = "CREATE TABLE ContainerConfig (ID TEXT PRIMARY KEY NOT NULL, Name TEXT, JSON TEXT)"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """The runtimes' folders; cgroups are below tmp_path/cgroup."""
    proc, crio, docker, podman, containerd, tree = (
        tmp_path / name for name in ("proc", "crio", "docker", "podman", "containerd", "cgroup")
    )
    for folder in (proc, crio, docker, podman, containerd, tree):
        folder.mkdir()
    made = Places(proc, crio, docker, podman, (containerd,))
    monkeypatch.setattr(runtimes, "PLACES", made)
    monkeypatch.setattr(cgroups, "root", lambda: tree)
    return made


def config(file: Path, cgroup: str, annotations: Mapping[str, str] | None = None) -> Path:
    """Write a bundle's config.json."""
    file.parent.mkdir(parents=True, exist_ok=True)
    document = {"annotations": annotations, "linux": {"cgroupsPath": cgroup}}
    file.write_text(json.dumps(document))
    return file


def bundle(
    places: Places, ident: str, cgroup: str, annotations: Mapping[str, str] | None = None
) -> Path:
    """Write a bundle of containerd."""
    return config(places.containerd[0] / "k8s.io" / ident / "config.json", cgroup, annotations)


def docker(places: Places, ident: str, document: object) -> Path:
    """Write Docker's description of a container, which runs."""
    config(places.containerd[0] / "moby" / ident / "config.json", f"system.slice:docker:{ident}")
    file = places.docker / ident / "config.v2.json"
    file.parent.mkdir()
    file.write_text(json.dumps(document))
    return file


def podman(
    places: Places,
    ident: str,
    name: str,
    annotations: Mapping[str, str] | None = None,
    comm: str = "conmon",
) -> Path:
    """Write a bundle of podman, and its conmon's process; return the latter."""
    userdata = places.podman / "overlay-containers" / ident / "userdata"
    config(userdata / "config.json", f"/machine.slice/libpod-{ident}", annotations)
    process = places.proc / str(100 + len(list(places.proc.iterdir())))
    process.mkdir()
    (process / "comm").write_text(f"{comm}\n")
    (process / "status").write_text("Name:\tconmon\nNSpid:\t100\nNSsid:\t1\n")
    words = ("/bin/conmon", "--api-version", "1", "-c", ident, "-u", ident, "-n", name, "-b")
    (process / "cmdline").write_bytes(
        b"\0".join(os.fsencode(word) for word in (*words, userdata, ""))
    )
    return process


def found(target: str) -> set[str]:
    """Return the cgroups that a target names, each below the root, whether they exist or not."""
    top = cgroups.root()
    paths = (
        container_targets.named(target, each, top / each.cgroup) for each in runtimes.containers()
    )
    return {str(path.relative_to(top)) for path in paths if path is not None}


# --- each runtime -------------------------------------------------------------------------


def test_podman(places: Places) -> None:
    podman(places, ID, "webshop", {"tier": "web"})
    podman(places, OTHER, "sleeper", comm="sleep")
    (places.proc / "self").mkdir()
    assert runtimes.containers() == [
        Container(ID, f"machine.slice/libpod-{ID}", frozenset({"webshop"}), {"tier": "web"})
    ]


@pytest.mark.parametrize(
    "written", [f"/{'x' * 256}", "/ü" * 1600, "-" * 100_000 + ".slice:a:b", "/../x", "/a\nb"]
)
def test_a_path_that_no_cgroup_can_have_names_none(places: Places, written: str) -> None:
    bundle(places, ID, "/market/shop", {"tier": "web"})
    bundle(places, OTHER, written, {"tier": "web"})
    (cgroups.root() / "market/shop").mkdir(parents=True)
    (cgroups.root() / "market/shop/cgroup.procs").touch()
    assert cgroups.find("label:tier=web") == [cgroups.root() / "market/shop"]


@pytest.mark.parametrize("whose", ["another user", "a container"])
def test_a_process_that_only_looks_like_conmon_does_not_count(places: Places, whose: str) -> None:
    process = podman(places, ID, "webshop")
    assert runtimes.containers()
    if whose == "another user":
        os.chown(process, 1000, 1000)
    else:
        (process / "status").write_text("Name:\tconmon\nNSpid:\t100\t7\n")
    assert runtimes.containers() == []


def database(places: Places, ident: str, labels: Mapping[str, str]) -> Path:
    """Write podman 5's database: the columns and types of podman 5.4.2."""
    file = places.podman / "db.sql"
    with closing(sqlite3.connect(file)) as made, made:
        made.execute(SCHEMA)
        document = json.dumps({"id": ident, "name": "x", "labels": labels}).encode()  # a BLOB
        made.execute("INSERT INTO ContainerConfig VALUES (?, 'x', ?)", (ident, document))
    file.chmod(0o644)
    return file


def test_podman_5_has_labels_in_a_database(places: Places) -> None:
    podman(places, ID, "webshop", {"annotated": "yes"})
    podman(places, OTHER, "beside")
    before = database(places, ID, {"tier": "web", "plain": ""}).read_bytes()
    assert found("label:tier=web") == found("label:plain") == {f"machine.slice/libpod-{ID}"}
    assert found("label:annotated=yes") == {f"machine.slice/libpod-{ID}"}
    assert (places.podman / "db.sql").read_bytes() == before
    assert sorted(path.name for path in places.podman.iterdir()) == ["db.sql", "overlay-containers"]


@pytest.mark.parametrize("what", ["no database", "no table", "writable for others", "not JSON"])
def test_a_damaged_database_is_reported_and_the_name_still_counts(
    places: Places, what: str
) -> None:
    podman(places, ID, "webshop")
    file = database(places, ID, {"tier": "web"})
    if what == "no database":
        file.write_bytes(b"\xff" * 5000)
    elif what == "writable for others":
        file.chmod(0o666)
    else:
        change = {"no table": "DROP TABLE ContainerConfig",
                  "not JSON": "UPDATE ContainerConfig SET JSON = '[['"}[what]  # fmt: skip
        with closing(sqlite3.connect(file)) as opened, opened:
            opened.execute(change)
    unread: Unread = {}
    (container,) = runtimes.containers(unread=unread)
    assert container.names == {"webshop"}
    assert container.labels == {}
    assert list(unread) == [file]


def test_podman_4_is_told_from_podman_5(places: Places) -> None:
    target = "label:tier=web"
    plain = "label:tier=web is on no running container"
    assert cgroups.absence(target) == plain
    (places.podman / "libpod").mkdir()
    (places.podman / "libpod/bolt_state.db").write_bytes(b"")
    assert cgroups.absence(target) == (
        f"{plain} (podman 4 keeps labels in its database: use --annotation tier=web or "
        "container:NAME)"
    )
    (places.podman / "db.sql").write_bytes(b"")
    assert cgroups.absence(target) == plain


def test_docker(places: Places) -> None:
    labels = {"tier": "web", "com.docker.compose.service": "shop"}
    docker(places, ID, {"ID": ID, "Name": "/webshop", "Config": {"Labels": labels}})
    docker(places, OTHER, {"ID": OTHER, "Name": "/old", "Config": {"Labels": None}})
    cgroup = {f"system.slice/docker-{ID}.scope"}
    assert found("container:webshop") == found("label:tier=web") == found("label:tier") == cgroup
    assert found("label:com.docker.compose.service=shop") == cgroup
    assert found("label:tier=webs") == found("label:tie") == found("container:web") == set()


def test_containerd(places: Places) -> None:
    bundle(places, ID, f"/default/{ID}", {"nerdctl/name": "webshop", "tier": "web"})
    bundle(places, "shop", "/market/shop", {})
    assert found("container:webshop") == found("label:tier=web") == {f"default/{ID}"}
    assert found("container:shop") == {"market/shop"}


CRI = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-id": SANDBOX,
    "io.kubernetes.cri.sandbox-namespace": "shop",
    "io.kubernetes.cri.sandbox-name": "web-1",
}
POD_SLICE = f"kubepods-burstable-pod{UID.replace('-', '_')}.slice"
PODS = {
    f"{POD_SLICE}:cri-containerd:{SANDBOX}": (
        f"kubepods.slice/kubepods-burstable.slice/{POD_SLICE}"
    ),
    f"/kubepods/besteffort/pod{UID}/{SANDBOX}": f"kubepods/besteffort/pod{UID}",
    f"/kubepods/pod{UID.replace('-', '')}/{SANDBOX}": f"kubepods/pod{UID.replace('-', '')}",
    f"/k8s.io/{SANDBOX}": f"k8s.io/{SANDBOX}",  # crictl, without a kubelet
    f"/podium/{SANDBOX}": f"podium/{SANDBOX}",
}


@pytest.mark.parametrize("written", PODS)
def test_a_pod_is_gated_with_its_sandbox(places: Places, written: str) -> None:
    bundle(places, SANDBOX, written, {**CRI, "io.kubernetes.cri.container-type": "sandbox"})
    named = {PODS[written]}
    for pattern in ("web-1", "web-*", "*", "we[ab]-?"):
        assert found(f"pod:shop/{pattern}") == named
    for pattern in ("shop/web", "shop/web-11", "shop/WEB-*", "other/web-1", "sho/*"):
        assert found(f"pod:{pattern}") == set()
    top = cgroups.root()
    (own,) = (top / container.cgroup for container in runtimes.containers())
    assert cgroups.naming(own, ["pod:shop/web-*", "unit:x"]) == [
        ("pod:shop/web-*", top / PODS[written])
    ]
    assert cgroups.naming(own.parent, ["pod:shop/web-*"]) == [], "nothing is known of it before"


def crio(places: Places, ident: str, annotations: Mapping[str, str]) -> None:
    cgroup = f"{POD_SLICE}:crio:{ident}"
    config(places.crio / ident / "userdata/config.json", cgroup, annotations)


def test_crio(places: Places) -> None:
    """A container has its own labels and those of its pod, which the sandbox has."""
    pod = {"io.kubernetes.pod.namespace": "shop", "io.kubernetes.pod.name": "web-1"}
    labels = "io.kubernetes.cri-o.Labels"
    crio(places, SANDBOX, {**pod, labels: '{"app": "web"}'})
    crio(
        places, ID,
        {**pod, labels: '{"own": "1"}', "io.kubernetes.container.name": "nginx",
         "io.kubernetes.cri-o.SandboxID": SANDBOX},
    )  # fmt: skip
    crio(places, OTHER, {labels: "[[", "io.kubernetes.cri-o.SandboxID": "../../x"})
    folder = f"kubepods.slice/kubepods-burstable.slice/{POD_SLICE}"
    both = {f"{folder}/crio-{ident}.scope" for ident in (ID, SANDBOX)}
    assert found("label:app=web") == both
    assert found("label:own=1") == found("container:nginx") == {f"{folder}/crio-{ID}.scope"}
    assert found("pod:shop/web-1") == {folder}


# --- what is not a container ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["webshop", f"libpod-{ID}.scope", f"libpod-{ID}", f"docker-{ID}.scope", ID,
     f"libpod-conmon-{ID}.scope", "webshop.service", f"user.slice/libpod-{ID}"],
)  # fmt: skip
def test_a_cgroup_that_only_has_the_name_is_not_the_container(places: Places, name: str) -> None:
    """A user's own folder, and one of a container that no runtime knows."""
    podman(places, ID, "webshop")
    targets = ["container:webshop", f"container:{ID}", f"container:{ID[:12]}"]
    top = cgroups.root()
    for path in (top / name, top / "machine.slice" / f"libpod-{ID}"):
        path.mkdir(parents=True)
        (path / "cgroup.procs").touch()
    assert cgroups.naming(top / name, targets) == []
    own = top / "machine.slice" / f"libpod-{ID}"
    assert cgroups.naming(own, targets) == [(target, own) for target in targets]
    assert cgroups.find_all(targets) == {target: [own] for target in targets}


def test_an_id_may_be_shortened(places: Places) -> None:
    bundle(places, ID, f"/docker/{ID}")
    named = {length for length in (64, 12, 6, 5) if found(f"container:{ID[:length]}")}
    assert named == {64, 12, 6}


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/../x",
        "a/../../x",
        "a.slice:b/../../c:d",
        "-.slice:a:b",
        1,
        None,
        "/a\0",
        "/\ud800",
    ],
)
def test_a_path_that_is_not_below_the_root_is_no_cgroup(places: Places, path: Any) -> None:
    """systemd's root slice is the root; a unit in it is below."""
    bundle(places, "shop", path)
    expected = {"a-b.scope"} if path == "-.slice:a:b" else set()
    assert found("container:shop") == expected


@pytest.mark.parametrize(
    ("text", "mode"),
    [(text, 0o600) for text in (b"", b"{", b"[]", b"[" * 100_000, b'{"Name": "/\xff"}')]
    + [(b'{"Name": "/webshop"}', 0o666), (b'{"Name": "' + b"x" * runtimes.LIMIT + b'"}', 0o600)],
)
def test_a_file_that_cannot_be_read_is_reported(places: Places, text: bytes, mode: int) -> None:
    file = docker(places, ID, {})
    file.write_bytes(text)
    file.chmod(mode)
    unread: Unread = {}
    (container,) = runtimes.containers(unread=unread)
    assert container.names == frozenset()
    assert list(unread) == [file]


def test_what_is_gone_or_has_another_shape_is_not_reported(places: Places) -> None:
    docker(places, ID, {"Name": 1, "Config": {"Labels": [1]}})
    docker(places, OTHER, {"Config": 1}).unlink()
    bundle(places, "empty", "/x").parent.joinpath("config.json").unlink()
    unread: Unread = {}
    assert {c.ident for c in runtimes.containers(unread=unread)} == {ID, OTHER}
    assert unread == {}


def test_an_owner_who_is_not_root_is_not_trusted(places: Places) -> None:
    os.chown(bundle(places, "shop", "/market/shop"), 1000, 1000)
    unread: Unread = {}
    assert runtimes.containers(unread=unread) == []
    (reason,) = unread.values()
    assert "owned by user 1000" in reason


# --- targets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("container:", "has no name"),
        ("unit:", "has no name"),
        ("label:", "has no name"),
        ("label:=web", "has no key"),
        ("pod:web-1", "is not a pod"),
        ("pod:*/web-1", "is not a pod"),
        ("pod:shop/", "is not a pod"),
        ("pod:shop/web 1", "is not a pod"),
        ("pod:a/b/c", "is not a pod"),
    ],
)
def test_a_malformed_target_is_an_error(target: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cgroups.checked(target)


def test_each_kind_of_target_is_accepted() -> None:
    for target in ("/sys/fs/cgroup/x", "unit:web", "container:web", "label:a", "label:a.b/c=d=e",
                   "label:a=", "pod:shop/web-*", "pod:kube-system/etcd-node.example"):  # fmt: skip
        assert cgroups.checked(target) == target


def test_completion_offers_what_people_gave(places: Places) -> None:
    bundle(places, ID, f"/default/{ID}", {**CRI, "nerdctl/name": "x", "tier": "web", "plain": ""})
    (container,) = runtimes.containers()
    assert set(container_targets.descriptions(container)) == {
        "label:tier=web", "label:plain", "pod:shop/web-1",
    }  # fmt: skip
    assert all(found(target) for target in container_targets.descriptions(container))
