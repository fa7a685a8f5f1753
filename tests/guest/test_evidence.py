"""A guest that does not boot or ends too early: the error says why, and what to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from ipsecgate.lab import debian, guest
from ipsecgate.lab.kernel import fetch
from ipsecgate.lab.uml import GuestHung, GuestPanicked, Uml
from tests.guest.broken import without_modules
from tests.guest.marks import where_guests_run

pytestmark = where_guests_run


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A lab cache that has the real user-mode-linux without modules, and no kernel for QEMU."""
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
    assert re.search("for QEMU: (apt-get install|remove) ", report)
    assert "a kernel that has ESP" in report


def test_json_output_has_the_evidence(broken: Path) -> None:
    done = demo(broken, "--json")
    document = json.loads(done.stderr[done.stderr.index("{") :])
    assert set(document) == {"error", "hint", "evidence"}
    assert "Kernel panic" in document["evidence"]


def test_a_guest_that_does_not_boot_is_killed_at_the_boot_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boot limit is independent of the command's timeout."""
    idle = tmp_path / "init"
    idle.write_text("echo waiting for nothing >/dev/console; sleep 1000\n")
    monkeypatch.setattr(Uml, "boot_limit", 10.0)
    monkeypatch.setattr(guest, "Uml", partial(Uml, init=idle))
    with pytest.raises(GuestHung, match="did not boot within 10 s") as caught:
        guest.run(["true"], timeout=600, kernel=fetch())
    assert not caught.value.booted
    assert "Run /bin/sh as init process" in caught.value.evidence


def test_after_a_panic_of_a_booted_guest_qemu_is_not_tried() -> None:
    progress: list[str] = []
    with pytest.raises(GuestPanicked, match="panicked while its command ran") as caught:
        guest.run(
            ["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"],
            timeout=120,
            progress=progress.append,
        )
    assert caught.value.booted
    assert "sysrq triggered crash" in caught.value.evidence
    assert progress == []


def test_a_library_that_cannot_be_built_is_reported(
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
