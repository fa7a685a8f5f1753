"""What becomes of held calls where Yama lets nobody look at a process: nothing opens."""

from __future__ import annotations

import json
import sys

import pytest

from ipsecgate.edges.probe import has_esp
from ipsecgate.lab.guest import run

pytestmark = pytest.mark.skipif(
    has_esp(), reason="this kernel has ESP: nothing runs in a guest here"
)


def test_nobody_is_held_any_more_and_the_hooks_refuse_as_ever() -> None:
    done = run([sys.executable, "-m", "tests.guest.yama"], timeout=300)
    assert done.exit_code == 0, done.output
    exit_code, said, error, outcome = json.loads(done.output.splitlines()[-1])
    assert (exit_code, said) == (1, ""), "exec does not run the command"
    assert "the controller refused hold" in error
    assert outcome == [None, True, ["EPERM"]], "it was refused until it was covered"
