"""How `make test-host` compares the state of a host before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.host.__main__ import differences, judge, lacking
from tests.host.machine import host_script

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
