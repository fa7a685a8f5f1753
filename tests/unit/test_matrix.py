"""The table of `make matrix` in the README: failures are shown, and every kernel has a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.matrix import table
from tests.matrix.__main__ import is_fine
from tests.matrix.runs import KERNELS, LISTS, ROOT, counts, plain

JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="one"/>
<testcase classname="a" name="two"><failure message="no"/></testcase>
<testcase classname="a" name="three"><error message="no"/></testcase>
<testcase classname="a" name="four"><skipped message="missing: UDP-Lite"/></testcase>
</testsuite></testsuites>"""
FEATURES = {"jit": "1", "btf": 9, "xfrm_interfaces": True, "ends_sockets": False}


def result(junit: Path, stopped: str = "") -> dict[str, Any]:
    lists = dict.fromkeys(LISTS, plain(counts(junit, stopped)))
    return {"kernel": "6.1.0", "features": FEATURES, "lists": lists}


@pytest.fixture
def junit(tmp_path: Path) -> Path:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    return path


def test_a_junit_file_is_counted(junit: Path) -> None:
    found = counts(junit)
    assert (found.passed, found.failed, found.skipped) == (1, 2, 1)
    assert found.failures == ["a.two", "a.three"]
    assert found.skips == ["missing: UDP-Lite"]


def test_failed_tests_are_shown_and_fail_the_run(junit: Path) -> None:
    made = table.rendered({KERNELS[0]: result(junit)}, "All.")
    assert "| **1, 2, 1** | **1, 2, 1** | compiled (JIT) | yes | yes | no |" in made
    assert made.endswith("\nAll. Skipped: 6.1.0: missing: UDP-Lite.\n")
    assert not is_fine(result(junit))


@pytest.mark.parametrize("stopped", ["", "the guest's kernel panicked"])
def test_a_kernel_that_stopped_is_shown_and_fails_the_run(tmp_path: Path, stopped: str) -> None:
    gone = result(tmp_path / "none.xml", stopped)
    gone |= {"kernel": "", "features": None}
    made = table.rendered({KERNELS[0]: gone}, "All.")
    said = f"**0, 0, 0: {stopped or 'no results'}**"
    assert f"| {said} | {said} | ? | ? | ? | ? |" in made
    assert not is_fine(gone)


def test_a_run_without_tests_fails(junit: Path) -> None:
    junit.write_text("<testsuites/>")
    assert not is_fine(result(junit))
    junit.write_text(JUNIT.replace("<failure", "<nothing").replace("<error", "<nothing"))
    assert is_fine(result(junit))


def test_the_table_in_the_readme_lists_every_kernel() -> None:
    text = (ROOT / "README.md").read_text()
    rows = text.partition(table.BEGIN)[2].partition(table.END)[0].splitlines()
    shown = [row for row in rows if row.startswith("| ")][2:]
    assert [row.split(" | ")[1] for row in shown] == [table.WHERE[name] for name in KERNELS]
    assert not [row for row in shown if "**" in row], "nothing failed"


def test_a_document_without_the_markers_is_an_error(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("nothing")
    with pytest.raises(ValueError, match="no place"):
        table.put_into(document, "| table |\n")
    document.write_text(f"before\n{table.BEGIN}old\n{table.END}after\n")
    table.put_into(document, "| table |\n")
    assert document.read_text() == f"before\n{table.BEGIN}| table |\n{table.END}after\n"
