"""The hosts of tests/scenario: each has a valid configuration, and one mistake."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from ipsecgate.edges.host import config
from tests.scenario.faults import FAULTS, HEALTHY, Fault

BROKEN = [name for name in FAULTS if name != HEALTHY]


@pytest.mark.parametrize("name", FAULTS)
def test_the_configuration_is_valid(name: str, tmp_path: Path) -> None:
    file = tmp_path / "ipsecgate.toml"
    file.write_text(FAULTS[name].config)
    assert config.load(file, required=True).settings.policies


@pytest.mark.parametrize("name", BROKEN)
def test_a_host_has_one_mistake(name: str) -> None:
    good, fault = asdict(Fault()), asdict(FAULTS[name])
    assert len([key for key in good if key != "clear" and good[key] != fault[key]]) == 1
