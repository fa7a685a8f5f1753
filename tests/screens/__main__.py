"""Record the screens in the guest, and draw them outside; `make screens` does both.

python -m tests.screens record FILE [NAME…]  on a kernel with ESP
python -m tests.screens draw FILE FOLDER     pictures of all, and a page with them
python -m tests.screens docs FILE            the pictures in docs/screens
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.screens.catalogue import SCREENS, WIDTHS
from tests.screens.recording import Recorded


def load(file: Path) -> list[Recorded]:
    """Read what `record` wrote."""
    return [
        Recorded(**{**item, "argv": tuple(item["argv"])}) for item in json.loads(file.read_text())
    ]


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["record", file, *names]:
            from tests.screens.stage import play  # noqa: PLC0415 - needs the guest

            wanted = names or [screen.name for screen in SCREENS]
            recorded = [asdict(item) for item in play(wanted, WIDTHS)]
            Path(file).write_text(json.dumps(recorded, indent=1))
        case ["draw", file, folder]:
            from tests.screens.pictures import draw_all  # noqa: PLC0415

            draw_all(load(Path(file)), Path(folder))
        case ["docs", file]:
            from tests.screens.pictures import draw_docs  # noqa: PLC0415

            draw_docs(load(Path(file)))
        case _:
            sys.stderr.write(__doc__ or "")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
