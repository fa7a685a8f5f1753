"""The gate on a kernel that was booted with ipv6.disable=1, as many servers are."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from ipsecgate.lab.guest import run
from ipsecgate.lab.kernel import fetch
from tests.guest.marks import where_guests_run

pytestmark = where_guests_run


def test_the_gate_works(tmp_path: Path) -> None:
    kernel, script = fetch(), tmp_path / "linux"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(kernel.binary))} ipv6.disable=1 "$@"\n')
    script.chmod(0o755)
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/system/no_ipv6.py"]
    done = run(tests, timeout=300, kernel=replace(kernel, binary=script))
    assert done.exit_code == 0, done.output
    assert "3 passed" in done.output
