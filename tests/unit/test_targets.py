"""Gated cgroups: when a step of a reload fails, and those of containers with one label."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ipsecgate.admin import loader
from ipsecgate.controller.targets import Targets
from ipsecgate.edges.host import cgroups, runtimes
from ipsecgate.edges.host.runtimes import Places
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths


@pytest.fixture
def attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """The gated cgroups; the tree is tmp_path."""
    gated: set[Path] = set()

    def detach(_paths: Paths, number: str) -> None:
        gated.remove(next(path for path in gated if path.stat().st_ino == int(number)))

    monkeypatch.setattr(cgroups, "root", lambda: tmp_path)
    monkeypatch.setattr(loader, "attach_path", lambda _paths, path: gated.add(path))
    monkeypatch.setattr(loader, "detach", detach)
    monkeypatch.setattr(loader, "prune", lambda _paths: set())
    return gated


def cgroup(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "cgroup.procs").touch()
    return path


async def test_a_failed_cleanup_of_pins_does_not_stop_a_reload(
    tmp_path: Path,
    attached: set[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without free descriptors the new policies applied but not the new cgroups."""
    old, new = cgroup(tmp_path / "old"), cgroup(tmp_path / "new")

    def prune(_paths: Paths) -> set[int]:
        raise GateError("prune: Too many open files")

    monkeypatch.setattr(loader, "prune", prune)
    targets = Targets(Paths(run=tmp_path / "run", cache=tmp_path / "cache"), [str(old)])
    await targets.scan()
    assert attached == {old}
    await targets.change([str(new)])
    assert attached == {new}
    assert "cannot remove the pins of removed cgroups: prune: Too many open files" in caplog.text


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run a container of containerd: write its bundle, and make its cgroup."""
    none, bundles = tmp_path / "none", tmp_path / "bundles"
    none.mkdir()
    monkeypatch.setattr(runtimes, "PLACES", Places(none, none, none, none, (bundles,)))

    def run(ident: str, **labels: str) -> Path:
        file = bundles / "default" / ident / "config.json"
        file.parent.mkdir(parents=True)
        document = {"annotations": labels, "linux": {"cgroupsPath": f"/default/{ident}"}}
        file.write_text(json.dumps(document))
        return cgroup(tmp_path / "default" / ident)

    return run


async def test_all_containers_with_a_label_are_gated_as_they_come(
    tmp_path: Path, attached: set[Path], run: Callable[..., Path]
) -> None:
    one, two = run("one", tier="web"), run("two", tier="web", other="x")
    run("three", tier="db")
    targets = Targets(
        Paths(run=tmp_path / "run", cache=tmp_path / "cache"), ["label:tier=web", "label:zone"]
    )
    await targets.scan()
    assert attached == {one, two}
    (missing,) = targets.errors
    assert missing.text == "label:zone is on no running container: it will be gated when it appears"
    assert missing.advice == "start it, or remove it from gate.cgroups"
    four = run("four", tier="web", zone="a")
    targets._appeared(four)
    targets._appeared(cgroup(tmp_path / "default/one2"))
    assert attached == {one, two, four}
    assert targets.errors == []
    (two / "cgroup.procs").unlink()
    two.rmdir()
    attached.discard(two)
    await targets.change(["label:zone"])
    assert attached == {four}


async def test_a_file_of_a_runtime_that_cannot_be_read_is_an_error_until_it_can(
    tmp_path: Path, attached: set[Path], run: Callable[..., Path]
) -> None:
    path = run("one", tier="web")
    file = tmp_path / "bundles/default/one/config.json"
    text = file.read_text()
    file.write_text(text[:-9])
    targets = Targets(Paths(run=tmp_path / "run", cache=tmp_path / "cache"), ["label:tier=web"])
    await targets.scan()
    targets._appeared(path)
    missing, unread = targets.errors
    assert missing.text.startswith("label:tier=web is on no running container: ")
    assert unread.text.startswith(f"{file} cannot be read, so its container may be missed: ")
    assert attached == set()
    file.write_text(text)
    await targets.scan()
    assert targets.errors == []
    assert attached == {path}
