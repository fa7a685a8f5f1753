"""The command line as an operator uses it: screens, JSON, exit codes, refusals."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.admin.status_document import ControllerStatus, Status
from ipsecgate.cli import main
from ipsecgate.edges.bpf.libbpf import call, closing_fd, open_pin
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.host import cgroups
from ipsecgate.lab import traffic
from ipsecgate.lab.endpoints import Client
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.connections import load_connection
from tests.system.under_exec import PORT, client, start, stopped, wait_held
from tests.typed_document import mismatches


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, cache: Path, unique: str) -> Run:
    """Run the command line in this process, with folders of this test."""

    def run(*arguments: str) -> Result:
        options = ("--run-dir", str(tmp_path / "run"), "--cache-dir", str(cache), "-i", unique)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*options, *arguments])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, out, err)

    return run


@pytest.fixture
def cgroup(unique: str) -> Iterator[Path]:
    folder = cgroups.root() / unique
    folder.mkdir()
    yield folder
    folder.rmdir()


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        file = tmp_path / "ipsecgate.toml"
        file.write_text(text)
        return str(file)

    return write


def test_load_attach_detach_unload(run: Run, cgroup: Path, unique: str) -> None:
    pins = Path("/sys/fs/bpf/ipsecgate") / unique
    assert run("status").code == 1
    assert run("attach", str(cgroup)).code == 1, "nothing is loaded"

    loaded = run("load")
    assert (loaded.code, loaded.out) == (0, f"loaded: {pins}\n")
    assert (pins / "maps/entries").exists()
    assert run("--json", "attach", str(cgroup)).json == {"attached": [str(cgroup)]}
    status = run("--json", "status")
    assert status.code == 1, "no controller"
    assert mismatches(status.json, Status) == []
    assert {h["hook"] for h in status.json["hooks"]} == HOOKS.keys()
    assert all(h["attached"] and h["cgroup"] == str(cgroup) for h in status.json["hooks"])

    refused = run("unload")
    assert refused.code == 1
    assert "unload --force" in refused.err
    assert (pins / "maps/entries").exists(), "refused, and nothing changed"
    assert run("detach", str(cgroup)).code == 0
    assert run("detach", str(cgroup)).code == 1
    assert run("unload").code == 0
    assert not pins.exists()

    run("load")
    run("attach", str(cgroup))
    assert run("unload", "--force").code == 0
    assert not pins.exists()


def test_a_removed_cgroup_is_shown_and_can_be_detached(run: Run, unique: str) -> None:
    folder = cgroups.root() / f"{unique}-gone"
    folder.mkdir()
    number = folder.stat().st_ino
    run("load")
    run("attach", str(folder))
    folder.rmdir()
    attached = {h["attached"] for h in run("--json", "status").json["hooks"]}
    assert attached == {False}
    assert f"removed cgroup {number}" in run("status").out
    assert run("detach", str(number)).code == 0
    assert run("unload").code == 0


def test_a_program_that_allows_no_other_is_named(run: Run, cgroup: Path, unique: str) -> None:
    """Neither its cgroup nor one below it can be gated; nothing stays half attached."""
    inside = cgroup / "inside"
    inside.mkdir()
    run("load")
    hook = "sendmsg4"  # not the first that is attached
    with (
        closing_fd(open_pin(Path(f"/sys/fs/bpf/ipsecgate/{unique}/progs/{hook}"))) as program,
        closing_fd(os.open(cgroup, os.O_RDONLY)) as folder,
    ):
        attach_type = HOOKS[hook].attach_type
        call("attach", "bpf_prog_attach", program, folder, attach_type, 0)
        for target in (cgroup, inside):
            refused = run("attach", str(target))
            assert refused.code == 1
            said = " ".join(refused.err.split())
            assert re.search(rf"{cgroup} has BPF program \d+ \({hook}\w*\) at {hook}", said), said
            assert "bpftool cgroup show" in said
            assert run("--json", "status").json["hooks"] == []
        call("detach", "bpf_prog_detach2", program, folder, attach_type)
    assert run("attach", str(inside)).code == 0
    assert run("unload", "--force").code == 0
    inside.rmdir()


POLICY = '[[policy]]\nname = "x"\nremote = ["10.0.0.0/8"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (POLICY + 'acton = "bypass"', "policy[1].acton: unknown key"),
        (POLICY.replace("10.0.0.0/8", "10.0.0.1/8"), "policy[1].remote: '10.0.0.1/8'"),
        (POLICY + POLICY, "policy[2].name: 'x' is already the name of policy[1]"),
        ("[gate", "Expected ']'"),
    ],
)
@pytest.mark.parametrize("verb", ["load", "run"])
def test_a_broken_configuration_changes_nothing(
    run: Run, config: Callable[[str], str], unique: str, verb: str, text: str, message: str
) -> None:
    file = config(text)
    result = run("--config", file, verb)
    assert result.code == 2
    assert f"{file}: " in result.err
    assert message in result.err
    assert not (Path("/sys/fs/bpf/ipsecgate") / unique).exists()


def test_an_unreadable_configuration_changes_nothing(run: Run, tmp_path: Path, unique: str) -> None:
    for file in (tmp_path / "missing.toml", tmp_path):
        result = run("--config", str(file), "load")
        assert result.code == 2
        assert str(file) in result.err
    assert not (Path("/sys/fs/bpf/ipsecgate") / unique).exists()


def test_a_target_that_does_not_exist_is_an_error(run: Run) -> None:
    run("load")
    for target in ("/sys/fs/cgroup/none", "/tmp", "unit:none", "container:abcdef123456"):
        assert run("attach", target).code == 2
    assert run("--json", "attach", "unit:none").err.startswith("{")
    assert run("frobnicate").code == 2
    assert run("unload").code == 0


def test_check_finds_everything_ok_on_a_kernel_with_esp(cache: Path) -> None:
    with Lab("ipsecgate-test-cli") as lab, Gated(lab, cache=cache) as gate:
        result = gate.cli("--json", "check")
        findings = json.loads(result.stdout)
        assert [f["name"] for f in findings if f["state"] == "missing"] == []
        assert {"root", "kernel", "esp", "strongswan", "hooks", "cgroup2", "bpffs"} <= {
            f["name"] for f in findings
        }
        assert result.returncode == 0

        lab.load(ConnSpec("net", "tunnel", 4))
        gate.wait_policy("net")
        screen = gate.cli("status").stdout
        for word in ("healthy", "running, pid", "1 cgroup: ", "1: 1 not asked for yet"):
            assert word in screen
        assert gate.process is not None
        assert gate.status()["controller"]["pid"] == gate.process.pid

        lab.a.charon.kill()
        result = gate.cli("--json", "check", check=False)
        assert [f["name"] for f in json.loads(result.stdout) if f["state"] == "missing"] == [
            "strongswan"
        ]
        assert result.returncode == 1


def test_the_status_has_its_declared_type(cache: Path) -> None:
    """With no list empty: errors, hooks, policies, negotiations, an SA and a held call."""
    with Lab("ipsecgate-test-cli") as lab, Gated(lab, cache=cache) as gate:
        lab.warm_up()
        lab.b.serve("tcp-server", PORT)
        covered, uncovered = (
            load_connection(lab, gate, "tunnel"),
            load_connection(lab, gate, "transport"),
        )
        assert client(lab, gate, "tcp-client", covered)["echoed"]
        gate.config.write_text("[gate")
        assert gate.cli("reload", check=False).returncode == 2
        with stopped(lab):
            command = traffic.command(
                "tcp-client", "--to", str(lab.b.address(uncovered)), "--port", str(PORT)
            )
            process = start(lab, gate, command)
            wait_held(gate)
            answer, document = gate.ask(), gate.status()
        assert Client(process).result()["echoed"]
    assert mismatches(answer, ControllerStatus) == []
    assert mismatches(document, Status) == []
    for name in ("errors", "hooks", "policies", "negotiations", "sas", "holds"):
        assert document[name], name
