"""Measure everything: `python -m bench` runs each part in turn, and `make bench` runs that.

    python -m bench [--quick] [--into DOCS] [PART...]
    python -m bench --render [--into DOCS] [PART...]

Each part writes its JSON report and its output into the results folder, and all of them together
make bench.json there. `--into docs` puts the tables into docs/performance.md and the plots beside
it, unless the run was a quick one. `--render` measures nothing and uses the reports that are there.
A part that fails does not stop the others; the exit code is then 1, and the reason is shown again
at the end.

Whatever else runs on the machine disturbs the figures: leave it alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from bench import document
from bench.parts import PARTS, Part, Run
from bench.report import Report, Value, machine
from bench.tables import show
from ipsecgate.lab.signals import exit_on_sigterm

RESULTS = Path(".cache/results/bench")
POLL = 0.2  # seconds

Say = Callable[[str], None]


class PartError(Exception):
    """A run of a part failed; the text says why."""


def last_line(log: Path) -> str:
    """Return the last line of a process's output that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def run(argv: Sequence[str], log: Path, say: Say) -> None:
    """Run a process with its output in a file, and pass on its last line. Raises: PartError.

    It has a session of its own, so that Ctrl-C reaches it once and it can clean up.
    """
    with log.open("a") as output:
        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(POLL)
                say(last_line(log))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
    if process.returncode:
        raise PartError(f"{last_line(log)} (exit code {process.returncode}, see {log})")


def add_conditions(file: Path, load: float) -> None:
    """Add to a report what its benchmark does not know: the load before it, and a guest's host.

    Raises: FileNotFoundError, ValueError, TypeError, KeyError.
    """
    report, here = Report.read(file), machine()
    settings: dict[str, Value] = {**report.settings, "load before": load}
    if report.machine["kernel"] != here["kernel"]:
        settings["host"] = document.words(here)
    replace(report, settings=settings).write(file)


def measure(part: Part, runs: Sequence[Run], folder: Path, say: Say) -> list[str]:
    """Run one part; return the reasons why a piece of it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{part.name}.log"
    log.write_text("")
    failed = []
    for old in (*part.runs, *part.quick):
        part.file(old, folder).unlink(missing_ok=True)
    if part.prepare:
        try:
            run([sys.executable, "-m", part.prepare], log, say)
        except PartError as error:
            failed.append(str(error))
    for one in runs:
        load = os.getloadavg()[0]
        try:
            run(part.argv(one, folder), log, say)
        except PartError as error:
            failed.append(str(error))
        file = part.file(one, folder)
        try:
            add_conditions(file, load)
        except FileNotFoundError:
            failed = failed or [f"it wrote no report (see {log})"]
        except (ValueError, TypeError, KeyError) as error:
            failed.append(f"its report is wrong: {error!r}")
            file.rename(file.with_suffix(".wrong"))
    return failed


def _describe(progress: Progress, task: TaskID, title: str, line: str) -> None:
    progress.update(task, description=f"{title} · {line[:60]}")


def measure_all(
    parts: Sequence[Part], quick: bool, folder: Path, console: Console
) -> dict[str, str]:
    """Run parts in turn and print their tables; return the reasons of those that failed."""
    failed = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    for number, part in enumerate(parts, 1):
        title = f"{number} of {len(parts)}: {part.title}"
        began = time.monotonic()
        if not console.is_terminal:
            console.print(title, highlight=False)
        live = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        with live as progress:
            say = partial(_describe, progress, progress.add_task(title), title)
            reasons = measure(part, part.quick if quick else part.runs, folder, say)
        console.print(f"{title}: {(time.monotonic() - began) / 60:.1f} minutes", highlight=False)
        if reports := part.reports(folder):
            show(part.title, part.rows(reports), part.layouts)
        for reason in reasons:
            console.print(f"failed: {reason}", style="red", markup=False, soft_wrap=True)
        if reasons:
            failed[part.name] = "; ".join(reasons)
    return failed


def combine(parts: Sequence[Part], failed: dict[str, str], folder: Path) -> None:
    """Write one file with all reports of a results folder and the failures of this run."""
    reports = {part.name: [asdict(one) for one in part.reports(folder)] for part in parts}
    whole = {"machine": machine(), "parts": reports, "failed": failed}
    (folder / "bench.json").write_text(f"{json.dumps(whole, indent=1)}\n")


def render(parts: Sequence[Part], folder: Path, docs: Path) -> list[Path]:
    """Put the tables of the parts that have reports into the documentation, and draw the plots.

    Raises: ImportError without matplotlib; ValueError; OSError.
    """
    from bench import plots  # noqa: PLC0415 - only this needs matplotlib

    sections, files = {}, []
    for part in parts:
        if reports := part.reports(folder):
            rows = part.rows(reports)
            sections[part.name] = document.section(part, reports, rows)
            files += plots.draw(part.name, rows, docs / "performance")
    document.put_into(docs / "performance.md", sections)
    return files


def main() -> int:
    """Run the command line."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes: minutes")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--into", type=Path, metavar="DOCS", help="the folder of performance.md")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"({RESULTS})")
    options = parser.parse_args()
    if unknown := {*options.parts} - {*names}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    parts = [part for part in PARTS if part.name in (options.parts or names)]
    folder = options.results.absolute()
    console = Console()
    failed: dict[str, str] = {}
    if not options.render:
        with exit_on_sigterm():
            failed = measure_all(parts, options.quick, folder, console)
        combine(PARTS, failed, folder)
        console.print(f"all reports: {folder / 'bench.json'}", highlight=False)
    if options.into and not options.quick:
        render([part for part in parts if part.name not in failed], folder, options.into)
    for name, reason in failed.items():
        console.print(f"{name} failed: {reason}", style="red", markup=False, soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
