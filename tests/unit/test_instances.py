"""When an instance may leave another namespace's flows to its instance: `admin.instances`."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipsecgate.admin.instances import _covers
from ipsecgate.edges.bpf.objects import HOOKS

ALL = set(HOOKS)
ROOT, SLICE, APP, BESIDE, REMOVED = 1, 2, 3, 4, 5
PATHS = {
    ROOT: Path("/sys/fs/cgroup"),
    SLICE: Path("/sys/fs/cgroup/slice"),
    APP: Path("/sys/fs/cgroup/slice/app"),
    BESIDE: Path("/sys/fs/cgroup/slice2"),
}


@pytest.mark.parametrize(
    ("theirs", "mine", "covers"),
    [
        ([APP], [APP], True),
        ([SLICE], [APP], True),
        ([ROOT], [APP, BESIDE], True),
        ([APP], [SLICE], False),  # other processes of the slice are asked only about by us
        ([SLICE], [BESIDE], False),  # a similar path
        ([SLICE], [APP, BESIDE], False),
        ([SLICE, BESIDE], [APP, BESIDE], True),
        ([REMOVED], [REMOVED], True),  # it lives on in its sockets
        ([ROOT], [REMOVED], False),  # where it was is not known any more
        ([], [APP], False),
    ],
)
def test_the_others_hooks_are_asked_wherever_ours_are(
    theirs: list[int], mine: list[int], covers: bool
) -> None:
    assert _covers(dict.fromkeys(theirs, ALL), dict.fromkeys(mine, ALL), PATHS) is covers


def test_every_one_of_the_others_hooks_counts() -> None:
    for missing in HOOKS:
        assert not _covers({APP: ALL - {missing}}, {APP: {"connect4"}}, PATHS)
