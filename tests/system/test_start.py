"""The commands of docs/start.md, as they are written there, on a host with a strongSwan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.edges.host import cgroups
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab
from tests.system.connections import load_connection
from tests.unit.test_commands_in_docs import blocks

PAGE = Path(__file__).parents[2] / "docs/start.md"
PORT = 7211
# What a reader replaces, or installs otherwise.
CGROUP, ADDRESS = "/sys/fs/cgroup/try", "10.2.0.9"
EXITS = {"why": 1}  # there is no SA yet


def commands() -> list[str]:
    """Return the commands of the section that ends with the next heading."""
    section = PAGE.read_text().partition("<!-- tests/system/test_start.py")[2].partition("\n## ")[0]
    return [line for line in blocks(section) if line]


@pytest.fixture
def installed(cache: Path) -> Iterator[Gated]:
    """A controller without a configured cgroup, as the package starts it."""
    with Lab("ipsecgate-test-start") as lab:
        gate = Gated(lab, cache=cache)
        gate.config.write_text(f'[gate]\nvici = "{lab.a.charon.vici_socket}"\n')
        with gate:
            yield gate


def test_the_commands_of_the_first_five_minutes(
    installed: Gated, unique: str, tmp_path: Path
) -> None:
    gate, lab = installed, installed.lab
    spec = load_connection(lab, gate, "tunnel")
    (tmp_path / "index.html").write_text("the page of the peer")
    server = [sys.executable, "-m", "http.server", str(PORT), "-d", str(tmp_path)]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "IPSECGATE_CONFIG": str(gate.config),
        "IPSECGATE_INSTANCE": gate.instance,
        "IPSECGATE_RUN_DIR": str(gate.paths.run),
        "IPSECGATE_CACHE_DIR": str(gate.paths.cache),
    }
    peer = str(lab.b.address(spec))
    done = {}
    web = lab.b.popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for line in commands():
            words = line.replace(CGROUP, str(cgroups.root() / unique))
            words = words.replace(f"{ADDRESS}:80", f"{peer}:{PORT}")
            words = words.replace(f"{ADDRESS}/", f"{peer}:{PORT}/")
            ran = lab.a.popen(
                ["sh", "-c", words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            output = ran.communicate(timeout=60)[0]
            verb = line.split()[1]
            assert ran.returncode == EXITS.get(verb, 0), f"{line}\n{output}"
            done[verb] = output
            if verb == "exec":
                assert lab.a.established(), "the call had an SA negotiated"
    finally:
        web.kill()
        web.wait()
    assert [*done] == ["check", CGROUP, "attach", "why", "exec", "status", "detach"]
    assert "no live SA" in done["why"] or "was not asked for yet" in done["why"]
    assert "the page of the peer" in done["exec"]
    assert not (cgroups.root() / unique).exists()
