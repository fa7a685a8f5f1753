"""Measure the last commit with the old tables again, for the columns "before" of the documentation.

    python -m bench.before

It checks that commit out into a temporary worktree, adds bench/hot_path.py and bench/growth.py as
they were first written, adapts them to the old modules (adapter.patch), and runs them there with
today's client. Two reports beside this file are the result. A table held 32 shapes and 16,384
selectors then, and each event compiled it anew, so there is nothing above 10,000 tunnels. Takes
two or three minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench.report import Report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OLD = "d44cf949871f"  # the parent of "tables: any number of selector shapes, …"
FIRST = "72ee0554"  # the first one with these two benchmarks
ADAPTED = ("bench/hot_path.py", "bench/growth.py")
TODAYS = ("bench/hot_path_client.c", "bench/report.py")
MASKS = (8, 32)
SIZES = ("10", "100", "1000", "10000")


def git(*words: str, at: Path = ROOT) -> None:
    """Run git(1). Raises: CalledProcessError."""
    subprocess.run(["git", "-C", str(at), *words], check=True)


def measure(tree: Path, module: str, *words: str) -> Report:
    """Run a benchmark of the old tree; return its report. Raises: CalledProcessError."""
    file = tree / "report.json"
    command = [sys.executable, "-m", module, *words, "--json", str(file)]
    subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
    return Report.read(file)


def main() -> None:
    """Measure, and write the reports."""
    with ExitStack() as stack:
        tree = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "old"
        git("worktree", "add", "--quiet", "--detach", str(tree), OLD)
        stack.callback(git, "worktree", "remove", "--force", str(tree))
        git("checkout", "--quiet", FIRST, "--", *ADAPTED, at=tree)
        git("apply", str(HERE / "adapter.patch"), at=tree)
        for name in TODAYS:
            shutil.copy(ROOT / name, tree / name)
        hooks = [measure(tree, "bench.hot_path", "--masks", str(masks)) for masks in MASKS]
        rows = tuple(row for report in hooks for row in report.rows if row.name == "ratio")
        growth = measure(tree, "bench.growth", *SIZES)
    settings = {"commit": OLD}
    replace(hooks[-1], rows=rows, settings=settings).write(HERE / "hot_path.json")
    replace(growth, settings=settings).write(HERE / "growth.json")


if __name__ == "__main__":
    main()
