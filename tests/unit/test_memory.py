"""What must be protected survives on disk, whole, or is an error: never an empty set."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from ipsecgate.core.events import ChildConfig
from ipsecgate.core.flow import TrafficSelector
from ipsecgate.core.ipsec import Mode
from ipsecgate.edges.memory import keep, recall
from ipsecgate.errors import GateError

CHILDREN = (
    ChildConfig(
        "gw",
        "net",
        Mode.TUNNEL,
        (TrafficSelector(ip_network("10.1.0.0/16")),),
        (
            TrafficSelector(ip_network("10.2.0.0/16"), 6, (80, 90)),
            TrafficSelector(ip_network("2001:db8::/32")),
        ),
    ),
    ChildConfig("gw", "none", Mode.TRANSPORT, (), ()),
)


def test_what_is_kept_is_recalled(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "children.json"
    assert recall(file) == ()
    keep(file, CHILDREN)
    assert recall(file) == CHILDREN
    keep(file, ())
    assert recall(file) == ()
    assert [path.name for path in file.parent.iterdir()] == ["children.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[{}]", '[{"ike": 1}]', "[1]", "null", '"x"'],
)
def test_a_broken_file_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "children.json"
    file.write_text(text)
    with pytest.raises(GateError, match=r"children\.json: cannot read") as caught:
        recall(file)
    assert "[[policy]]" in caught.value.hint


def test_a_cut_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "children.json"
    keep(file, CHILDREN)
    whole = file.read_text()
    for length in range(1, len(whole) - 1, 7):
        file.write_text(whole[:length])
        with pytest.raises(GateError):
            recall(file)
