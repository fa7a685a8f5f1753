"""Gated cgroups when a step of a reload fails: the new configuration is still complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipsecgate.admin import loader
from ipsecgate.controller.targets import Targets
from ipsecgate.edges.host import cgroups
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths


async def test_a_failed_cleanup_of_pins_does_not_stop_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without free descriptors the new policies applied but not the new cgroups."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    attached: set[Path] = set()

    def prune(_paths: Paths) -> set[int]:
        raise GateError("prune: Too many open files")

    def detach(_paths: Paths, number: str) -> None:
        attached.remove(next(path for path in attached if path.stat().st_ino == int(number)))

    monkeypatch.setattr(cgroups, "root", lambda: tmp_path)
    monkeypatch.setattr(cgroups, "find", lambda target: [Path(target)])
    monkeypatch.setattr(loader, "attach_path", lambda _paths, path: attached.add(path))
    monkeypatch.setattr(loader, "detach", detach)
    monkeypatch.setattr(loader, "prune", prune)
    targets = Targets(Paths(run=tmp_path), [str(old)])
    await targets.scan()
    assert attached == {old}
    await targets.change([str(new)])
    assert attached == {new}
    assert "cannot remove the pins of removed cgroups: prune: Too many open files" in caplog.text
