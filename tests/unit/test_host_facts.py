"""What `check` gathers of a host: units, names, clocks, limits and swanctl.conf."""

from __future__ import annotations

import os
import time
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipsecgate.core.codec.swanctl import proposals
from ipsecgate.edges.host import clock, limits, names, units
from ipsecgate.edges.strongswan import swanctl_conf


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the units as `make install` leaves them, where systemd does not run."""
    for unit in units.shipped().glob("*.service"):
        text = unit.read_text().replace("@bindir@", "/opt/ipsecgate/bin")
        (tmp_path / unit.name).write_text(text)
    monkeypatch.setattr(units, "_FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(units, "_RUNNING", tmp_path / "none")
    return tmp_path


def test_installed_units_are_this_versions(installed: Path) -> None:
    found = {unit.name: unit for unit in units.units()}
    assert found.keys() >= {"ipsecgate.service", "ipsecgate-load.service"}
    assert all(unit.text == unit.shipped for unit in found.values() if "service" in unit.name)


def test_another_versions_unit_differs(installed: Path) -> None:
    path = installed / "ipsecgate.service"
    path.write_text(path.read_text().replace("WatchdogSec=20s", "WatchdogSec=10s"))
    (installed / "ipsecgate-load.service").unlink()
    found = {unit.name: unit for unit in units.units()}
    assert found["ipsecgate.service"].text != found["ipsecgate.service"].shipped
    assert found["ipsecgate-load.service"].text is None


def test_names_are_looked_up() -> None:
    found, failed = names.resolve(["localhost", "nosuch.invalid"], 30.0)
    assert found["localhost"] & {ip_address("127.0.0.1"), ip_address("::1")}
    assert failed.keys() == {"nosuch.invalid"}
    assert names.resolve([]) == ({}, {})
    assert names.resolve(["localhost"], 0.0)[1].keys() <= {"localhost"}, "or it was fast"


def test_the_kernel_tells_of_its_clocks() -> None:
    assert clock.is_synchronised() in (True, False)
    hardware = clock.hardware_clock()
    assert hardware is None or hardware > 0


def test_limits_are_read() -> None:
    watches = limits.inotify_watches()
    assert watches is not None
    assert watches > 0
    before = limits.descriptors(os.getpid())
    fd = os.open("/", os.O_RDONLY)
    try:
        after = limits.descriptors(os.getpid())
    finally:
        os.close(fd)
    assert before is not None
    assert after is not None
    assert after[0] == before[0] + 1
    assert limits.descriptors(4194303) is None


def test_swanctl_conf_with_the_files_that_it_includes(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    main = tmp_path / "swanctl.conf"
    main.write_text("# all\ninclude conf.d/*.conf\n")
    one = "connections {\n  NAME {\n    proposals = aes128-sha256-x25519\n  }\n}\n"
    for name in ("a", "b"):
        (tmp_path / f"conf.d/{name}.conf").write_text(one.replace("NAME", name))
    (tmp_path / "conf.d/loop.conf").write_text(f"include {main}\n")
    began = time.monotonic()
    assert proposals(swanctl_conf.read_text(main)).keys() == {"a", "b"}
    assert time.monotonic() - began < 10, "files that include each other end"
    assert swanctl_conf.read_text(tmp_path / "none") == ""
