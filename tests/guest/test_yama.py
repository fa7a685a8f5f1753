"""Yama's strictest setting: no call can be inspected, so none is held, and nothing opens."""

from __future__ import annotations

import json
import sys

import pytest

from ipsecgate.edges.kernel.probe import has_esp
from ipsecgate.lab.guest import run

pytestmark = pytest.mark.skipif(
    has_esp(),
    reason="this kernel has ESP: nothing runs in a guest, and only a reboot undoes this setting",
)


def test_no_call_is_held_and_the_hooks_still_refuse() -> None:
    done = run([sys.executable, "-m", "tests.guest.yama"], timeout=300)
    assert done.exit_code == 0, done.output
    exit_code, output, error, outcome = json.loads(done.output.splitlines()[-1])
    assert (exit_code, output) == (1, ""), "exec does not run the command"
    assert "the controller refused hold" in error
    assert outcome == [None, True, ["EPERM"]], "refused until it was covered"
