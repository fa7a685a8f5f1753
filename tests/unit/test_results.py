"""The summary of JUnit files, tested with files that pytest itself writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.results import summary

PASSES = "def test_passes(): pass\n"
SKIPPED = "import pytest\ndef test_skipped(): pytest.skip('missing: a kernel')\n"
FAILS = "def test_fails(): assert 1 == 2\n"
BROKEN = (
    "import pytest\n@pytest.fixture\ndef bed(): raise OSError('no bed')\ndef test_it(bed): pass\n"
)


@pytest.mark.parametrize(
    ("source", "good", "said"),
    [
        (PASSES, True, "1 of 1 passed"),
        (PASSES + SKIPPED, False, "skipped: test_it.test_skipped: missing: a kernel"),
        (PASSES + FAILS, False, "failed: test_it.test_fails: assert 1 == 2"),
        (BROKEN, False, "no bed"),
        ("", False, "0 of 0 passed"),
    ],
)
def test_only_a_run_in_which_every_test_passed_is_good(
    tmp_path: Path, source: str, good: bool, said: str
) -> None:
    (tmp_path / "test_it.py").write_text(source)
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", f"--junitxml={tmp_path}/it.xml", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, check=False)
    lines, whole = summary(tmp_path / "it.xml")
    assert whole is good
    assert said in "\n".join(lines)


def test_a_missing_results_file_is_not_good(tmp_path: Path) -> None:
    lines, whole = summary(tmp_path / "none.xml")
    assert not whole
    assert "No such file" in lines[0]
