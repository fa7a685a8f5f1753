"""Judge ORACLE_CASES calls in random worlds from ORACLE_SEED on, by default a random seed."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from tests.system.oracle.capture import HarnessError
from tests.system.oracle.judge import WrongAnswerError
from tests.system.oracle.run import run, settings
from tests.system.oracle.two_namespaces import two_namespaces


def main() -> int:
    seed, cases = settings(random.SystemRandom().randrange(2**32), 100_000)
    with tempfile.TemporaryDirectory() as cache, two_namespaces(Path(cache)) as place:
        try:
            run(place, seed, cases, sys.stdout)
        except (WrongAnswerError, HarnessError) as error:
            sys.stdout.write(f"{type(error).__name__}: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
