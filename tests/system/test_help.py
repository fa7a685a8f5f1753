"""On real hosts: a support bundle without the keys of real SAs, and completion of live values."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.lab import traffic
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import PSK, Lab
from tests.system.connections import load_connection
from tests.system.under_exec import PORT, client

pytestmark = pytest.mark.second_guest


@pytest.fixture(scope="module")
def gate(cache: Path) -> Iterator[Gated]:
    with Lab("ipsecgate-test-help") as lab, Gated(lab, cache=cache) as made:
        lab.b.serve("tcp-server", PORT)
        yield made


def encodings(secret: bytes) -> Iterator[bytes]:
    """Yield what would give a secret away: raw, reversed, and in the usual notations."""
    for data in (secret, secret[::-1]):
        yield data
        yield data.hex().encode()
        yield data.hex().upper().encode()
        yield data.hex(":").encode()
        yield data.hex(" ").encode()
        yield ", ".join(map(str, data)).encode()
        yield "".join(f"\\x{byte:02x}" for byte in data).encode()
        for shift, before in ((0, 0), (1, 2), (2, 3)):  # base64 within a longer text
            whole = (shift + len(data)) * 8 // 6  # characters that depend on nothing behind
            yield base64.b64encode(bytes(shift) + data)[before:whole]


def leaks(data: bytes, secrets: list[bytes]) -> list[bytes]:
    return [form for secret in secrets for form in encodings(secret) if form in data]


def test_a_bundle_has_no_key_of_a_live_sa(gate: Gated, tmp_path: Path) -> None:
    lab = gate.lab
    lab.reset()
    spec = load_connection(lab, gate, "tunnel")
    assert client(lab, gate, "tcp-client", spec)["echoed"]
    states = subprocess.run(
        ["ip", "-n", lab.a.namespace.name, "xfrm", "state"], capture_output=True, check=True
    ).stdout
    keys = [bytes.fromhex(found.decode()) for found in re.findall(rb"0x([0-9a-f]{32,})", states)]
    assert len(keys) >= 2, "one in each direction at least"
    secrets = [*keys, *(key[: len(key) // 2] for key in keys), PSK.encode()]
    assert leaks(states, secrets), "the search finds what ip prints"
    for secret in secrets:
        for form in encodings(secret):
            assert len(form) >= 8
            assert leaks(b"..." + form + b"...", [secret])

    archive = tmp_path / "bundle.tar.gz"
    lab.a.run(gate.argv("bugtool", "--output", str(archive)))
    with gzip.open(archive) as opened:
        assert leaks(opened.read(), secrets) == []
    files = unpacked(archive)
    spis = re.findall(rb"spi (0x[0-9a-f]{8})", states)
    assert all(spi in files["xfrm/states.txt"] for spi in spis), "the SAs themselves are there"
    assert spec.child_name.encode() in files["strongswan/list-sas.txt"]
    assert json.loads(files["status.json"])["sas"]
    manifest = json.loads(files["manifest.json"])
    errors = {item["name"]: item["error"] for item in manifest["items"] if item["error"]}
    needed = {"status.json", "check.json", "xfrm/states.txt", "strongswan/list-sas.txt"}
    assert not needed & errors.keys(), errors


def unpacked(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as opened:
        found = {member.name: opened.extractfile(member) for member in opened.getmembers()}
        return {
            name.partition("/")[2]: file.read() for name, file in found.items() if file is not None
        }


COMPLETE = """
import json, os, sys
from ipsecgate.cli.app import cli
from ipsecgate.cli.shells import Bash
os.environ["COMP_BREAKS"] = ""
for line in sys.argv[1:]:
    os.environ["COMP_LINE"] = line
    shown = Bash(cli, {}, "ipsecgate", "").complete().splitlines()
    print(json.dumps([each.partition(",")[2] for each in shown]))
"""


def completed(gate: Gated, *endings: str) -> list[set[str]]:
    """Return what bash is offered after each of these words, for this gate."""
    python, options = gate.argv()[:2], gate.argv()[4:]
    lines = [" ".join(["ipsecgate", *options, words]) for words in endings]
    done = gate.lab.a.run([*python, "-c", COMPLETE, *lines])
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def test_live_values_are_completed(gate: Gated) -> None:
    lab = gate.lab
    lab.reset()
    spec = load_connection(lab, gate, "transport")
    target = str(lab.b.address(spec))
    command = traffic.command("tcp-client", "--to", target, "--port", str(PORT))
    lab.a.run(command, cgroup=gate.cgroup, check=False)

    unit = lab.cgroup(f"{gate.instance}/web.service")
    units, gated, instances = completed(gate, "attach u", "detach ", "-i lab")
    assert "unit:web" in units
    assert gated == {str(gate.cgroup)}
    assert gate.instance in instances
    gate.cli("attach", str(unit))
    inside = lab.a.popen(["sleep", "60"], cgroup=unit)
    try:
        assert completed(gate, "detach ", "exec --cgroup u", "why --pid ", f"why {target}") == [
            {str(gate.cgroup), str(unit), "unit:web"},
            {"unit:web"},
            {str(inside.pid)},
            {f"{target}:{PORT}"},
        ]
    finally:
        inside.kill()
        inside.wait()
    gate.cli("detach", str(unit))
