"""The parts of `python -m bench`: what runs, in which order, and which tables it makes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench.report import Report, Row
from bench.tables import NAME, Layout

BEFORE = Path(__file__).parent / "before"
GUEST_LIMIT = "3600"  # seconds
ANY_FLOW = "UDP connect, any covered flow"
USUAL = {"selectors": (16384,), "masks": (32,)}
SIZES = ((10, 10), (1000, 32), (16384, 8), (16384, 32), (100_000, 32), (1_000_000, 256))
"""Selectors and masks of the hooks' tables."""


@dataclass(frozen=True)
class Run:
    """One process: `python -m` these words, and `--json FILE`, a name with `suffix`."""

    words: tuple[str, ...]
    suffix: str = ""


@dataclass(frozen=True)
class Part:
    """One benchmark. `quick`: the runs of `--quick`. `guest`: it needs a kernel with ESP.

    `room`: other instances on this machine would disturb it, because the controller looks for them.
    `prepare`: a module that runs first, on this machine, because it needs the network. `settings`:
    those that tell the reports of several runs apart. `before`: rows of these names are also shown
    as they were measured before the tables took any number of shapes.
    """

    name: str
    title: str
    runs: tuple[Run, ...]
    quick: tuple[Run, ...]
    layouts: tuple[Layout, ...] = ()
    guest: bool = False
    room: bool = False
    prepare: str = ""
    settings: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    def file(self, run: Run, folder: Path) -> Path:
        """Return the file of a run's report in a results folder."""
        return folder / f"{self.name}{run.suffix}.json"

    def argv(self, run: Run, folder: Path) -> list[str]:
        """Return the command line of one run."""
        command = [sys.executable, "-m", *run.words, "--json", str(self.file(run, folder))]
        if self.room:
            return [sys.executable, "-m", "ipsecgate.lab.room", "--", *command]
        if not self.guest:
            return command
        guest = [sys.executable, "-m", "ipsecgate.lab.guest", "--timeout", GUEST_LIMIT]
        return [*guest, "--results", str(folder), "--", *command]

    def reports(self, folder: Path) -> list[Report]:
        """Return the reports that a results folder has. Raises: ValueError, TypeError, KeyError."""
        files = dict.fromkeys(self.file(run, folder) for run in (*self.runs, *self.quick))
        return [Report.read(file) for file in files if file.is_file()]

    def rows(self, reports: list[Report], before: Path = BEFORE) -> list[Row]:
        """Return the rows of the reports, and those from before, with "before" in their names."""
        rows = [
            replace(
                row,
                of={**row.of, **{k: v for k, v in report.settings.items() if k in self.settings}},
            )
            for report in reports
            for row in report.rows
        ]
        if self.before:
            old = Report.read(before / f"{self.name}.json").rows
            rows += [
                replace(row, name=f"{row.name}, before") for row in old if row.name in self.before
            ]
        return rows


def _hot_path(selectors: int, masks: int, *more: str) -> Run:
    size = ("--selectors", str(selectors), "--masks", str(masks))
    return Run(("bench.hot_path", *size, *more), f"-{selectors}-{masks}")


PARTS = (
    Part(
        "first_connection",
        "first connection to a protected peer",
        (Run(("bench.first_connection",)),),
        (Run(("bench.first_connection", "--rounds", "2", "--delays", "0", "100")),),
        (
            Layout(("connected",), ("way",), ("one way",)),
            Layout(("after the SA",), ("way",), ("one way",)),
            Layout(
                ("SYNs again", "packets in clear", "not connected"), ("way",), (NAME, "one way")
            ),
        ),
        guest=True,
        prepare="bench.libreswan",
    ),
    Part(
        "failure",
        "failed negotiation: which error, and when",
        (Run(("bench.failure",)),),
        (Run(("bench.failure", "--samples", "1", "--failures", "wrong key")),),
        (Layout(("told after",), ("way",), ("failure",), lead="error"),),
        guest=True,
    ),
    Part(
        "hot_path",
        "cost of the hooks",
        tuple(_hot_path(*size, "--turns", "21" if size != (16384, 32) else "41") for size in SIZES),
        tuple(_hot_path(*size, "--turns", "5") for size in ((1000, 32), (16384, 32))),
        (
            Layout(("without", "gated", "ratio", "ratio, before"), ("call",), where=USUAL),
            Layout(("ratio",), ("call",), ("selectors", "masks"), spread=False),
            Layout(("ratio, before",), ("call",), ("selectors", "masks"), spread=False),
        ),
        settings=("selectors", "masks"),
        before=("ratio",),
    ),
    Part(
        "growth",
        "growth of the controller's core",
        (Run(("bench.growth", "10", "100", "1000", "10000", "100000")),),
        (Run(("bench.growth", "10", "100", "1000")),),
        (
            Layout(
                tuple(
                    f"{n}{when}"
                    for n in ("load", "close", "open", "memory")
                    for when in ("", ", before")
                ),
                ("tunnels",),
                spread=False,
            ),
        ),
        before=("load", "close", "open", "memory"),
    ),
    Part(
        "footprint",
        "footprint of the controller",
        (Run(("bench.footprint",)),),
        (Run(("bench.footprint", "idle", "start")),),
        room=True,
    ),
    Part(
        "hold",
        "held calls",
        (Run(("bench.hold",)),),
        (
            Run(
                (
                    "bench.hold",
                    "--rounds",
                    "2",
                    "--calls",
                    "500",
                    "--releases",
                    "2",
                    "--programs",
                    "1",
                )
            ),
        ),
    ),
    Part(
        "hold_release",
        "release of held calls",
        (Run(("bench.hold_release",)),),
        (Run(("bench.hold_release", "--rounds", "5", "--delays", "0")),),
        (Layout(tail=True),),
        guest=True,
    ),
    Part(
        "packet",
        "the backstop",
        (Run(("bench.packet",)),),
        (Run(("bench.packet", "--turns", "100")),),
    ),
)
