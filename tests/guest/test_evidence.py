"""A guest that does not boot, or ends too early: the user reads why, and what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipsecgate.edges.kernel.probe import has_esp
from ipsecgate.lab import debian, guest
from ipsecgate.lab.kernel import fetch
from ipsecgate.lab.uml import GuestHung, GuestPanicked, Uml
from tests.guest.broken import without_modules

pytestmark = pytest.mark.skipif(
    has_esp(), reason="this kernel has ESP: nothing runs in a guest here"
)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A lab cache: the real user-mode-linux without its modules, and no kernel for QEMU."""
    without_modules(tmp_path)
    (tmp_path / debian.META).mkdir()
    return tmp_path


def demo(cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ipsecgate", *options, "demo"],
        env={**os.environ, "IPSECGATE_LAB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_demo_shows_the_console_of_a_guest_that_panics(broken: Path) -> None:
    done = demo(broken)
    _before, _error, report = done.stderr.partition("ipsecgate: no test kernel boots")
    assert done.returncode == 125
    assert "panicked before its command began" in report
    console = report.partition("the last 20 lines of its console:\n")[2].splitlines()[:20]
    assert all(line.startswith("    ") for line in console), report
    assert "overlay.ko" in "".join(console)
    assert "Kernel panic - not syncing: Attempted to kill init!" in "".join(console)
    assert "QEMU instead: " in report
    assert "apt-get install" in report or "remove" in report  # what to do about QEMU
    assert "a kernel that has ESP" in report


def test_as_a_document_it_has_the_same(broken: Path) -> None:
    done = demo(broken, "--json")
    document = json.loads(done.stderr[done.stderr.index("{") :])
    assert set(document) == {"error", "hint", "evidence"}
    assert "Kernel panic" in document["evidence"]


def test_a_guest_that_does_not_boot_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of a boot is not the command's."""
    idle = tmp_path / "init"
    idle.write_text("echo waiting for nothing >/dev/console; sleep 1000\n")
    monkeypatch.setattr(guest, "INIT", idle)
    monkeypatch.setattr(Uml, "boot_limit", 10.0)
    with pytest.raises(GuestHung, match="did not boot within 10 s") as caught:
        guest.run(["true"], timeout=600, kernel=fetch())
    assert not caught.value.booted
    assert "Run /bin/sh as init process" in caught.value.evidence


def test_a_guest_that_panics_later_is_not_tried_under_qemu() -> None:
    said: list[str] = []
    with pytest.raises(GuestPanicked, match="panicked while its command ran") as caught:
        guest.run(
            ["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"],
            timeout=120,
            progress=said.append,
        )
    assert caught.value.booted
    assert "sysrq triggered crash" in caught.value.evidence
    assert said == []


def test_a_library_that_cannot_be_built_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = fetch()
    monkeypatch.setattr("ipsecgate.lab.xstate.needed", lambda: True)
    monkeypatch.setenv("IPSECGATE_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(guest.GuestError, match="no C compiler") as caught:
        guest.run(["true"], kernel=kernel)
    assert "apt-get install tcc" in caught.value.hint
    assert not caught.value.booted
