"""Summarize pytest's JUnit files, so that no skipped test goes unnoticed.

    python -m tests.results FILE...

Prints how many tests of each file passed, and for every other test the reason. Exits with 1 if a
test failed or was skipped, or if a file is missing or empty, because then nothing ran.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

BAD = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def summary(path: Path) -> tuple[list[str], bool]:
    """Return the lines to print about a file, and whether it has tests and all of them passed."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return [f"{path}: {error}"], False
    lines = []
    for case in cases:
        for child in case:
            if child.tag in BAD:
                name = f"{case.get('classname')}.{case.get('name')}"
                why = child.get("message", "").strip().partition("\n")[0]
                lines.append(f"    {BAD[child.tag]}: {name}: {why}")
    passed = sum(all(child.tag not in BAD for child in case) for case in cases)
    return [f"{path}: {passed} of {len(cases)} passed", *lines], 0 < passed == len(cases)


def main() -> int:
    """Summarize the files on the command line."""
    good = True
    for word in sys.argv[1:]:
        lines, whole = summary(Path(word))
        sys.stdout.write("\n".join(lines) + "\n")
        good = good and whole
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
