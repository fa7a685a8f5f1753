"""Judge random worlds for as long as was asked for: ORACLE_CASES calls from ORACLE_SEED on."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.system.oracle.run import run, settings


def main() -> int:
    seed, cases = settings(cases=100_000)
    with tempfile.TemporaryDirectory() as cache:
        return run(Path(cache), seed, cases, sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
