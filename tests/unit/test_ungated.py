"""Who is not gated: by which target a cgroup is named, and where gate.cgroups is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipsecgate.admin import ungated
from ipsecgate.paths import Paths

SLICE = Path("/sys/fs/cgroup/system.slice")


@pytest.mark.parametrize(
    ("cgroup", "target", "short"),
    [
        (SLICE / "webshop.service", "unit:webshop", "webshop.service"),
        (SLICE / "webshop.service/app", "unit:webshop", "webshop.service"),
        (Path("/sys/fs/cgroup/mine"), "/sys/fs/cgroup/mine", "/sys/fs/cgroup/mine"),
        (SLICE, str(SLICE), str(SLICE)),
    ],
)
def test_a_cgroup_is_named_as_the_operator_would(cgroup: Path, target: str, short: str) -> None:
    assert (ungated.target_of(cgroup), ungated.short_name(cgroup)) == (target, short)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[gate]\nmode = "audit"\n  cgroups = ["unit:a"]\n', ":3"),
        ('[gate]\n# cgroups = ["unit:a"]\n', ""),
        (None, ""),
    ],
)
def test_where_the_gated_cgroups_are_written(tmp_path: Path, text: str | None, line: str) -> None:
    file = tmp_path / "ipsecgate.toml"
    if text is not None:
        file.write_text(text)
    assert ungated.place(Paths(config=file)) == f"{file}{line}"
