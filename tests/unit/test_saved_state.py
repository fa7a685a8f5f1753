"""Saved state is read back complete or is an error, never an empty set."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from ipsecgate.core.model.flow import TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, Mode
from ipsecgate.edges.host.saved_state import (
    load_children,
    load_targets,
    save_children,
    save_targets,
)
from ipsecgate.errors import GateError

CHILDREN = (
    ChildConfig(
        ChildName("gw", "net"),
        Mode.TUNNEL,
        (TrafficSelector(ip_network("10.1.0.0/16")),),
        (
            TrafficSelector(ip_network("10.2.0.0/16"), 6, (80, 90)),
            TrafficSelector(ip_network("2001:db8::/32")),
        ),
    ),
    ChildConfig(ChildName("gw", "none"), Mode.TRANSPORT, (), ()),
)


def test_saved_children_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "children.json"
    assert load_children(file) == ()
    save_children(file, CHILDREN)
    assert load_children(file) == CHILDREN
    save_children(file, ())
    assert load_children(file) == ()
    assert [path.name for path in file.parent.iterdir()] == ["children.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[{}]", '[{"ike": 1}]', "[1]", "null", '"x"', "{}", '""', "[" * 3000],
)
def test_a_broken_file_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "children.json"
    file.write_text(text)
    with pytest.raises(GateError, match=r"children\.json: cannot read") as caught:
        load_children(file)
    assert "remove the file" in caught.value.hint


NET = '["10.2.0.0/16", 6, 80, 90]'


@pytest.mark.parametrize(
    "broken",
    [
        *('""', "{}", "null", "[[]]", '["10.2.0.0/16"]', '[["10.2.0.0/16", 6, 80]]'),
        *(NET.replace("6", number) for number in ("256", "-1", "6.0", "Infinity", "NaN", "true")),
        *(NET.replace("80, 90", ports) for ports in ("90, 80", "0, 65536", "-1, 9", "1, 1e999")),
        NET.replace('"10.2.0.0/16"', "5"),
    ],
)
def test_a_broken_selector_is_an_error(tmp_path: Path, broken: str) -> None:
    """Some were once read as "protects nothing", which opened their networks at the next start."""
    file = tmp_path / "children.json"
    item = '[{"ike": "gw", "child": "net", "mode": "TUNNEL", "local": [], "remote": %s}]'
    file.write_text(item % f"[{NET}]")
    assert len(load_children(file)[0].remote) == 1
    file.write_text(item % (f"[{broken}]" if broken.startswith("[") else broken))
    with pytest.raises(GateError, match="cannot read"):
        load_children(file)


def test_a_lone_surrogate_is_not_a_name(tmp_path: Path) -> None:
    file = tmp_path / "children.json"
    file.write_text(
        r'[{"ike": "\ud800", "child": "net", "mode": "TUNNEL", "local": [], "remote": []}]'
    )
    with pytest.raises(GateError, match="cannot read"):
        load_children(file)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "children.json"
    save_children(file, CHILDREN)
    whole = file.read_text()
    for length in range(1, len(whole) - 1, 7):
        file.write_text(whole[:length])
        with pytest.raises(GateError):
            load_children(file)


def test_saved_targets_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "cgroups.json"
    assert load_targets(file) == ()
    save_targets(file, ("unit:a.service", "/sys/fs/cgroup/b"))
    assert load_targets(file) == ("unit:a.service", "/sys/fs/cgroup/b")


@pytest.mark.parametrize("text", ["", "[", "[1]", "{}", '"x"', "[[]]", "null", "[" * 3000])
def test_broken_targets_are_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cgroups.json"
    file.write_text(text)
    with pytest.raises(GateError, match=r"cgroups\.json: cannot read which cgroups are gated"):
        load_targets(file)
