"""The names of containers, from files as the runtimes write them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ipsecgate.edges.host import cgroups, runtimes
from ipsecgate.edges.host.runtimes import Places

ID, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for name in ("proc", "docker", "containerd"):
        (tmp_path / name).mkdir()
    return Places(*(tmp_path / name for name in ("proc", "docker", "containerd")))


def conmon(proc: Path, *words: str, comm: str = "conmon") -> Path:
    process = proc / str(100 + len(list(proc.iterdir())))
    process.mkdir()
    (process / "comm").write_text(f"{comm}\n")
    (process / "cmdline").write_bytes(
        b"\0".join(os.fsencode(w) for w in ("/bin/conmon", *words, ""))
    )
    return process


def test_podman(places: Places) -> None:
    conmon(
        places.proc, "--api-version", "1", "-c", ID, "-u", ID, "-r", "/bin/crun", "-n", "webshop"
    )
    conmon(places.proc, "-c", OTHER, "-n", "sleeper", comm="sleep")
    (places.proc / "self").mkdir()
    assert runtimes.names(places) == {ID: {"webshop"}}


def test_another_users_containers_do_not_count(places: Places) -> None:
    os.chown(conmon(places.proc, "-c", ID, "-n", "webshop"), 1000, 1000)
    assert runtimes.names(places) == {}


def test_docker(places: Places) -> None:
    (places.docker / ID).mkdir()
    (places.docker / ID / "config.v2.json").write_text(json.dumps({"ID": ID, "Name": "/webshop"}))
    assert runtimes.names(places) == {ID: {"webshop"}}


def test_containerd(places: Places) -> None:
    for namespace, ident, known in (
        ("k8s.io", ID, {"io.kubernetes.cri.container-name": "webshop"}),
        ("default", OTHER, {"nerdctl/name": "webshop"}),
        ("moby", "ab" * 32, {}),
    ):
        bundle = places.containerd / namespace / ident
        bundle.mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps({"annotations": known}))
    assert runtimes.names(places) == {ID: {"webshop"}, OTHER: {"webshop"}}


@pytest.mark.parametrize(
    ("text", "mode"),
    [(text, 0o600) for text in ("", "{", "[]", '{"Name": 1}', "[" * 100_000)]
    + [('{"Name": "/webshop"}', 0o666)],
)
def test_a_damaged_or_untrusted_file_names_nothing(places: Places, text: str, mode: int) -> None:
    (places.docker / ID).mkdir()
    file = places.docker / ID / "config.v2.json"
    file.write_text(text)
    file.chmod(mode)
    assert runtimes.names(places) == {}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (f"libpod-{ID}.scope", True),
        (f"libpod-{ID}", True),
        (f"docker-{ID}.scope", True),
        (f"cri-containerd-{ID}.scope", True),
        (f"crio-{ID}.scope", True),
        (ID, True),
        (f"libpod-conmon-{ID}.scope", False),
        (f"crio-conmon-{ID}.scope", False),
        (f"libpod-{OTHER}.scope", False),
        ("webshop", True),  # a bare runtime's id is a name
        ("webshop2", False),
        ("my-webshop.service", False),
    ],
)
def test_cgroups_of_a_container(monkeypatch: pytest.MonkeyPatch, name: str, found: bool) -> None:
    monkeypatch.setattr(runtimes, "names", lambda: {ID: {"webshop"}})
    path = Path("/sys/fs/cgroup/machine.slice") / name
    assert cgroups.naming(path, ["container:webshop", "unit:x"]) == (
        {"container:webshop"} if found else set()
    )


def test_an_id_may_be_shortened() -> None:
    path = Path(f"/sys/fs/cgroup/docker/{ID}")
    targets = [f"container:{ID[:length]}" for length in (64, 12, 6, 5)]
    assert cgroups.naming(path, targets) == set(targets[:3])
