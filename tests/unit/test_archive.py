"""Packages from another Debian suite: a separate apt configuration with this machine's mirror."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ipsecgate.errors import GateError
from ipsecgate.lab import archive, debian
from ipsecgate.lab.archive import Archive

TARGETS = """\
Debian Debian-Security http://mirror.example/security/
Example Example http://other.example/
Debian Debian http://mirror.example/debian/
"""
DEPENDS = """\
linux-image-amd64
  Depends: linux-base-7.3.4+deb13-amd64
  Depends: linux-image-7.3.4+deb13-amd64
 |Depends: initramfs-tools
  Depends: <linux-initramfs-tool>
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for apt-get and apt-cache that record their arguments and sources.list."""
    for name in ("apt-get", "apt-cache"):
        program = tmp_path / name
        program.write_text(
            f"""#!/bin/sh
echo "{name} $*" >>{tmp_path}/calls
[ -z "$APT_CONFIG" ] || cat "${{APT_CONFIG%/*}}/sources.list" >>{tmp_path}/sources
case "$1 $3" in
    "indextargets"*) cat {tmp_path}/targets ;;
    "depends linux-image-amd64") cat {tmp_path}/depends ;;
    "update"*) exit $(cat {tmp_path}/status) ;;
esac
"""
        )
        program.chmod(0o755)
    (tmp_path / "targets").write_text(TARGETS)
    (tmp_path / "depends").write_text(DEPENDS)
    (tmp_path / "status").write_text("0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("APT_CONFIG", raising=False)
    return tmp_path


def test_another_suite_comes_only_from_the_mirror_of_this_machine(apt: Path) -> None:
    with Archive.for_suite("trixie-backports") as suite:
        assert debian.kernel_packages(suite) == [
            *("linux-base-7.3.4+deb13-amd64", "linux-image-7.3.4+deb13-amd64"),
        ]
        own = suite.configuration
    lines = {line.partition("] ")[2] or line for line in (apt / "sources").read_text().splitlines()}
    assert {line.removeprefix("deb ") for line in lines} == {
        "http://mirror.example/debian/ trixie-backports main"
    }
    assert own is not None
    assert not own.exists(), "its package lists are removed"


def test_the_running_suite_uses_apt_as_it_is_configured(apt: Path) -> None:
    with Archive.for_suite(None) as here:
        assert debian.kernel_packages(here)
    assert "update" not in (apt / "calls").read_text()
    assert not (apt / "sources").exists()


@pytest.mark.parametrize("suite", ["Trixie", "../x", "a b", "", "trixie\n"])
def test_an_invalid_suite_name_is_refused_before_apt_runs(apt: Path, suite: str) -> None:
    with pytest.raises(GateError, match="not a Debian suite"), Archive.for_suite(suite):
        pass
    assert not (apt / "calls").exists()


def test_a_missing_suite_is_an_error_that_names_it(apt: Path) -> None:
    (apt / "status").write_text("100")
    with pytest.raises(GateError, match="apt-get update") as caught, Archive.for_suite("nosuch"):
        pass
    assert "nosuch" in caught.value.hint


def test_without_a_debian_mirror_in_the_sources_the_error_says_so(apt: Path) -> None:
    (apt / "targets").write_text("Example Example http://other.example/\n")
    with pytest.raises(GateError, match="no Debian mirror"):
        archive.mirror()


def test_an_archive_without_a_kernel_is_an_error(apt: Path) -> None:
    (apt / "depends").write_text("")
    with pytest.raises(GateError, match="knows no linux-image"), Archive.for_suite(None) as here:
        debian.kernel_packages(here)
