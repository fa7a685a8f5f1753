"""The short form of `make fuzz`, and a check that planted defects are found."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

import pytest

from tests.fuzz import planted_defects as planted
from tests.fuzz.__main__ import fuzz
from tests.fuzz.engine import Target
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.skipif(find_spec("atheris") is None, reason="missing: atheris")

INPUTS = int(os.environ.get("FUZZ_INPUTS", "3000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


def figures(printed: str) -> tuple[int, int]:
    """Return the number of inputs, and how many were accepted."""
    found = re.search(r" (\d+) inputs +(\d+) accepted", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: str(kind.name))
def test_no_input_breaks_a_decoder(kind: type[Target]) -> None:
    done = fuzz(kind, INPUTS, SEED)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    inputs, accepted = figures(done.stdout)
    assert inputs == INPUTS
    assert 0 < accepted < INPUTS, "some inputs were accepted and some refused"


def test_a_decoder_without_a_defect_passes() -> None:
    done = fuzz(planted.Sound, INPUTS, SEED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert figures(done.stdout)[1] >= INPUTS // 16


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (planted.Mistaken, "decoded as 3"),
        (planted.Strict, "refused a real message, never"),
        (planted.Touched, "changed state"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_planted_defect_is_found(kind: type[Target], said: str) -> None:
    done = fuzz(kind, INPUTS, SEED)
    assert done.returncode != 0
    assert said in done.stdout
    assert f"again: .venv/bin/python -m tests.fuzz --target {kind.name} --hex " in done.stdout


def test_an_input_with_new_coverage_is_mutated_further() -> None:
    """One of 2^24 prefixes crashes: guessing alone does not find it."""
    done = fuzz(planted.Crashes, 1_000_000, SEED)
    assert done.returncode != 0, done.stdout
    assert "raised IndexError" in done.stdout
