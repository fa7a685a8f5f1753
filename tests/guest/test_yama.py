"""Yama's strictest setting: no call can be inspected, so none is held, and nothing opens."""

from __future__ import annotations

import json
import sys

from ipsecgate.lab.guest import run
from tests.guest.marks import where_guests_run

pytestmark = where_guests_run


def test_no_call_is_held_and_the_hooks_still_refuse() -> None:
    done = run([sys.executable, "-m", "tests.guest.yama"], timeout=300)
    assert done.exit_code == 0, done.output
    exit_code, output, error, outcome = json.loads(done.output.splitlines()[-1])
    assert (exit_code, output) == (1, ""), "exec does not run the command"
    assert "the controller refused hold" in error
    assert outcome == [None, True, ["EPERM"]], "refused until it was covered"
