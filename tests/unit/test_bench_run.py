"""`python -m bench` with small parts instead of the real ones."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench import __main__ as bench
from bench.parts import Part, Run
from bench.report import Report, Row

WRITES = """
import sys
from pathlib import Path
from bench.report import Report, Row
Report("x", "a title", (Row("took", "ms", (1.0, 2.0), {"way": "a"}),)).write(Path(sys.argv[-1]))
"""
FAILS = "print('no peer'); raise SystemExit(3)"
WRONG = "import sys; open(sys.argv[-1], 'w').write('{}')"


def part(name: str, tmp_path: Path, program: str) -> Part:
    """Return a part that runs a program instead of a module of bench."""
    file = tmp_path / f"{name}.py"
    file.write_text(program)

    class Program(Part):
        def argv(self, run: Run, folder: Path) -> list[str]:
            argv = super().argv(run, folder)
            return [argv[0], str(file), *argv[2:]]

    run = Run((name,))
    return Program(name, f"the part {name}", (run,), (run,))


def test_a_failed_part_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(bench.__file__).parents[1]))
    folder = tmp_path / "results"
    parts = [part("bad", tmp_path, FAILS), part("good", tmp_path, WRITES)]
    parts.append(part("odd", tmp_path, WRONG))
    output = io.StringIO()
    failed = bench.measure_all(parts, False, folder, Console(file=output, width=200))
    log = folder / "bad.log"
    assert failed["bad"] == f"no peer (exit code 3, see {log})"
    assert failed["odd"].startswith("its report is wrong")
    assert "good" not in failed
    assert f"failed: {failed['bad']}" in output.getvalue()
    bench.combine(parts, failed, folder)
    whole = json.loads((folder / "bench.json").read_text())
    assert whole["failed"] == failed
    assert [row["samples"] for row in whole["parts"]["good"][0]["rows"]] == [[1.0, 2.0]]
    assert (whole["parts"]["bad"], whole["parts"]["odd"]) == ([], [])


def test_a_report_says_how_busy_the_machine_was(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    Report("x", "", (Row("took", "ms", (1.0,)),)).write(file)
    bench.add_conditions(file, 0.5)
    assert Report.read(file).settings == {"load before": 0.5}


def test_an_old_report_does_not_count_for_a_new_run(tmp_path: Path) -> None:
    failing = part("bad", tmp_path, FAILS)
    Report("bad", "", ()).write(failing.file(failing.runs[0], tmp_path))
    assert bench.measure(failing, failing.runs, tmp_path, lambda _: None)
    assert failing.reports(tmp_path) == []
