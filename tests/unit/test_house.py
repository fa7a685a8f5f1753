"""The project's own rules as tests, so that `pytest` runs them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients import table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "tool",
    ["ruff check --quiet", "ruff format --check --quiet --diff", "mypy --no-error-summary"],
)
def test_linters_and_types_are_clean(tool: str) -> None:
    command = [sys.executable, "-m", *tool.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    "script",
    [
        *("packaging/setup.sh", ".ci/run", "vagrant/provision.sh", "vagrant/first-connection"),
        *("tests/vagrant/box.sh", "tests/vagrant/run.sh", "tests/fleet/run.sh"),
    ],
)
def test_scripts_parse_and_are_executable(script: str) -> None:
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.stat().st_mode & 0o111


def test_the_table_in_the_docs_lists_every_client() -> None:
    rows = table.rows_in((ROOT / "docs/clients.md").read_text())
    assert [*rows] == table.NAMES
    assert not [row for row in rows.values() if "**" in row], "no client may hang or crash"
