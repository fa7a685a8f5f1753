"""Run the kernel-facing tests on several kernels in turn, and write the README's table.

    python -m tests.matrix [--into DOCUMENT] [KERNEL...]

Kernels: user-mode-linux, and Debian's kernels of the suites in `runs`. The results of each kernel
are kept in .cache/results/matrix.json, so a table can combine several runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.matrix import table
from tests.matrix.runs import KERNELS, RESULTS, measure

KEPT = RESULTS.with_suffix(".json")


def versions() -> str:
    """Return a sentence with the versions of the programs that ran on the kernels."""
    packages = {"charon-systemd": "strongSwan", "python3-bpfcc": "BCC"}
    query = ["dpkg-query", "-W", "-f", "${Package} ${Version}\n", *packages]
    output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    installed = dict(line.split() for line in output.splitlines())
    debian = Path("/etc/debian_version").read_text().strip()
    programs = [f"{name} {installed[package]}" for package, name in packages.items()]
    return f"All with Debian {debian}'s programs: {', '.join(programs)}."


def kept() -> dict[str, Any]:
    """Return the results of earlier runs, by kernel."""
    return dict(json.loads(KEPT.read_text())) if KEPT.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests, keep the results, write the table. Return 0 if every result is fine."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--into", type=Path, metavar="DOCUMENT", help="document with the table")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(KERNELS))
    options = parser.parse_args(arguments)
    if unknown := {*options.kernels} - {*KERNELS}:
        parser.error(f"no such kernel: {', '.join(unknown)}")
    for name in () if options.table else options.kernels or KERNELS:
        say(f"\n--- {name}\n")
        result = {**measure(name, say), "under": versions()}
        RESULTS.mkdir(parents=True, exist_ok=True)
        KEPT.write_text(json.dumps({**kept(), name: result}, indent=1))
    results = kept()
    made = table.rendered(results, results_under(results))
    say(f"\n{made}")
    if options.into:
        table.put_into(options.into, made)
    return 0 if all(map(is_fine, results.values())) else 1


def results_under(results: dict[str, Any]) -> str:
    """Return the distinct version sentences of the results."""
    return " ".join(sorted({result["under"] for result in results.values()}))


def is_fine(result: dict[str, Any]) -> bool:
    """Return whether both lists have passed tests and no failure on a kernel."""
    return bool(result["features"]) and all(
        counts["passed"] and not counts["failed"] and not counts["stopped"]
        for counts in table.lists(result)
    )


def say(text: str) -> None:
    """Print the guest's output."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
