"""One kernel of the matrix: boot it, find its features, run the test lists, return the results.

Rules of this module: a kernel that does not boot or stops early is a result, too, shown in place of
its numbers. The numbers come from pytest's JUnit files.
"""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipsecgate.errors import GateError
from ipsecgate.lab import debian, kernel
from ipsecgate.lab.guest import run
from tests.matrix import foreign
from tests.matrix.features import BYTECODE as VARIABLE

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".cache/results/matrix"
BYTECODE = ROOT / ".cache/bytecode"
LIMIT = 2400.0
UML = "user-mode-linux"
AARCH64 = "aarch64"
SUITES = ("bookworm", "trixie", "trixie-backports")
KERNELS = (UML, *SUITES, AARCH64)
LISTS = ("hooks", "gate")
"""The test lists tests/qemu/*.list: tests of the hooks alone, and of the gate on two hosts."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The results of a test list; `stopped` says why it did not run to its end, "" if it did."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)
    stopped: str = ""


def counts(junit: Path, stopped: str = "") -> Counts:
    """Count the results in a JUnit file; a missing file has none."""
    if not junit.is_file():
        return Counts(stopped=stopped or "no results")
    passed, failures, skips = 0, [], []
    for case in ET.parse(junit).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(name)
        elif skip is not None:
            skips.append(skip.get("message") or name)
        else:
            passed += 1
    return Counts(passed, len(failures), len(skips), failures, sorted({*skips}), stopped)


def find(name: str) -> kernel.Kernel:
    """Return a kernel; download it if it is missing. Raises: GateError."""
    if name == UML:
        return kernel.fetch(progress=_say)
    if name == AARCH64:
        return foreign.fetch(_say)
    return debian.fetch(progress=_say, suite=name)


def measure(name: str, say: Callable[[str], object]) -> dict[str, Any]:
    """Run everything on one kernel; return the results for JSON."""
    try:
        chosen = find(name)
    except GateError as error:
        stopped = Counts(stopped=str(error))
        return {"kernel": "", "features": None, "lists": dict.fromkeys(LISTS, plain(stopped))}
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / "features.json"
    found.unlink(missing_ok=True)
    _guest(chosen, [sys.executable, "-m", "tests.matrix.features", str(found)], folder, say)
    features = json.loads(found.read_text()) if found.is_file() else None
    lists = {test_list: plain(_list(chosen, test_list, folder, say)) for test_list in LISTS}
    return {"kernel": chosen.release, "features": features, "lists": lists}


def _list(chosen: kernel.Kernel, name: str, folder: Path, say: Callable[[str], object]) -> Counts:
    junit = folder / f"{name}.xml"
    junit.unlink(missing_ok=True)
    which = ["tests/qemu/test_kernel.py"] if isinstance(chosen, debian.DebianKernel) else []
    command = [sys.executable, "-m", "pytest", *which, f"@tests/qemu/{name}.list"]
    stopped = _guest(chosen, [*command, f"--junitxml={junit}"], folder, say)
    return counts(junit, stopped)


def _guest(
    chosen: kernel.Kernel, command: list[str], folder: Path, say: Callable[[str], object]
) -> str:
    """Run a command in a guest; return why it did not run to its end, "" if it did."""
    try:
        if isinstance(chosen, foreign.ForeignKernel):
            # Bytecode depends on the architecture, so the guest compiles its own.
            variables = {VARIABLE: str(folder / "bytecode")}
            foreign.run(chosen, ["python3", *command[1:]], variables, folder, LIMIT, say)
        else:
            env = {**os.environ, VARIABLE: str(BYTECODE)}
            run(
                command,
                env=env,
                cwd=ROOT,
                timeout=LIMIT,
                results=folder,
                on_output=say,
                kernel=chosen,
            )
    except GateError as error:
        say(f"{error}\n{getattr(error, 'output', '')}\n")
        return str(error)
    return ""


def plain(result: Counts) -> Mapping[str, Any]:
    """Return the results of a list for JSON."""
    return {name: getattr(result, name) for name in result.__slots__}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
