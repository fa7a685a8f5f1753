"""How `make test-host` compares the state of a host before and after."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.host import state
from tests.host.__main__ import differences, judge, lacking
from tests.host.machine import HERE, INIT, host_script

WANTED = (
    *("xfrm state", "xfrm policy", "rule", "rule of IPv6", "route", "pin", "cgroup", "process"),
    *("IKE", "files of /etc", "unit", "BPF", "sysctl"),
)


def test_every_change_addition_and_removal_is_reported() -> None:
    before = {"rule": {"a": "1", "b": "1"}, "pin": {"p": "7"}}
    after = {"rule": {"a": "1", "c": "1"}, "pin": {"p": "8"}}
    assert list(differences(before, after)) == [
        "pin: p: 7 -> 8",
        "rule: b: 1 -> gone",
        "rule: c: missing -> 1",
    ]
    assert list(differences(before, before)) == []


def test_a_host_without_any_state_of_its_own_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare: dict[str, dict[str, str]] = {what: {} for what in WANTED}
    assert {line.split(":")[0] for line in lacking(bare)} == set(bare)
    for number in range(2):
        (tmp_path / f"state-{number}.json").write_text(json.dumps(bare))
    assert judge(tmp_path, ["true"]) == len(lacking(bare))
    assert "this host lacks" in capsys.readouterr().out


def test_the_state_is_recorded_after_every_command() -> None:
    script = host_script(["make demo", "echo 'it is'"], Path("/r"))
    assert [script.count(f"/r/state-{number}.json") for number in range(4)] == [1, 1, 1, 0]
    assert "'make demo'" in script


def test_the_commands_own_folders_are_left_out_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("checkout/inside", "checkout-2/file", "pytest-of-me/file", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(state, "CHECKOUT", tmp_path / "checkout")
    found = state.files(str(tmp_path), re.compile(rf"^{re.escape(str(tmp_path))}/pytest-of-"))
    assert {Path(name).relative_to(tmp_path) for name in found} == {
        Path(name) for name in ("checkout-2", "checkout-2/file", "file")
    }


@pytest.mark.parametrize("script", [INIT, HERE / "units/etc/host.sh"], ids=lambda path: path.name)
def test_a_script_is_valid_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)
