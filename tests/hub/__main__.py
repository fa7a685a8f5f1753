"""`make hub` in the test kernel. HUB_SEED repeats a run; the others set the size, see `Size`.

HUB_SITES, HUB_WARRIORS, HUB_UP, HUB_DOWN, HUB_CHANGES, HUB_DELETIONS, HUB_KILLS.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from tests.hub.run import Size, run


def main() -> int:
    seed = int(os.environ.get("HUB_SEED") or random.SystemRandom().randrange(1 << 32))
    given = {field.name: os.environ.get(f"HUB_{field.name.upper()}") for field in fields(Size)}
    size = Size(**{name: int(value) for name, value in given.items() if value})
    with tempfile.TemporaryDirectory() as cache:
        try:
            run(Path(cache), seed, size, sys.stdout)
        except AssertionError as error:
            sys.stdout.write(f"seed {seed}: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
