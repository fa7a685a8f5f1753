"""The controller as a service: watched, and closed through what breaks it.

A real process and real hooks; no IKE daemon, so whatever must be protected is refused.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ipsecgate.core.model.flow import TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, Mode
from ipsecgate.edges.host.saved_state import keep, recall
from tests.system.caller import Caller
from tests.system.hooked_cgroup import PEER, THERE
from tests.system.unit import PORT, Unit, caller, refused, unit

__all__ = ["caller", "unit"]

pytestmark = pytest.mark.second_guest


def test_systemd_hears_that_it_is_ready_alive_and_stopping(unit: Unit, caller: Caller) -> None:
    unit.start(env={"WATCHDOG_USEC": "200000"})
    assert unit.hears("READY=1"), unit.log
    assert any("STATUS=protected flows are refused: IKE" in line for line in unit.heard)
    beats = []
    for _ in range(40):
        unit.heard.clear()
        assert unit.hears("WATCHDOG=1"), "though nothing happens"
        beats.append(time.monotonic())
    assert beats[-1] - beats[0] > 0.05 * len(beats), "no more often than is asked for"
    assert unit.process is not None
    unit.process.send_signal(signal.SIGTERM)
    assert unit.hears("STOPPING=1")
    assert unit.ended() == 0
    assert refused(caller)


STUCK = """
import asyncio
from ipsecgate.controller.controller import Controller
async def stuck(self, command):
    await asyncio.Event().wait()
Controller._execute = stuck
"""


def test_a_decision_that_never_ends_is_not_called_alive(unit: Unit) -> None:
    unit.start(code=STUCK, env={"WATCHDOG_USEC": "200000"})
    assert unit.eventually(lambda: unit.ask()["pid"]), "the rest of it goes on"
    assert not unit.hears("WATCHDOG=1", 1)


CALLBACK = """
from ipsecgate.edges.bpf import datapath
def defect(record):
    raise LookupError("a defect in a callback")
datapath.layout.unpack_event = defect
"""
TASK = """
from ipsecgate.edges.kernel import routes
async def defect(self):
    raise LookupError("a defect in a task")
routes.Routes._tell = defect
"""
STEP = """
from ipsecgate.core.gate.gate import Gate
def defect(self, *events):
    raise LookupError("a defect in a decision")
Gate.step = defect
"""


@pytest.mark.parametrize("code", [CALLBACK, TASK, STEP], ids=["callback", "task", "decision"])
def test_a_defect_ends_the_process_and_opens_nothing(unit: Unit, caller: Caller, code: str) -> None:
    unit.start(code=code)
    assert unit.process is not None
    deadline = time.monotonic() + 30
    while unit.process.poll() is None:
        assert time.monotonic() < deadline, unit.log
        caller("tcp", PEER[4], PORT)
        time.sleep(0.02)
    assert unit.ended() == 1
    assert "LookupError: a defect in a" in unit.log
    assert refused(caller)
    unit.start()
    assert unit.hears("READY=1"), unit.log
    assert refused(caller)


def test_no_more_descriptors(unit: Unit, caller: Caller) -> None:
    """Who connects to the control socket takes none from the kernel's side."""
    unit.start(files=64)
    assert unit.hears("READY=1"), unit.log
    path = unit.folder / "run" / unit.name / "control.sock"
    with ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(os.fspath(path))
        assert refused(caller)
        time.sleep(0.5)
    assert unit.process is not None
    assert unit.process.poll() is None, unit.log
    assert unit.eventually(lambda: unit.ask()["ready"]), "clients are accepted again"


def test_too_few_descriptors_to_start_opens_nothing(unit: Unit, caller: Caller) -> None:
    unit.start()
    assert unit.hears("READY=1"), unit.log
    unit.end()
    for files in range(8, 40, 4):
        unit.start(files=files)
        assert unit.eventually(partial(settled, unit)), files
        assert refused(caller), files
        unit.end()
    assert "Too many open files" in unit.log


def settled(unit: Unit) -> bool:
    """Tell whether a controller that was started is ready, or ended in vain."""
    assert unit.process is not None
    return unit.process.poll() is not None or unit.ask()["ready"]


def test_no_room_in_the_run_folder_opens_nothing(unit: Unit, caller: Caller) -> None:
    """Whichever of its files has no room: the controller ends with a reason, or does without."""
    run = unit.folder / "run"
    run.mkdir()
    unit.start()
    assert unit.hears("READY=1"), unit.log
    unit.end()
    outcomes = []
    for inodes in range(2, 10):
        options = f"nr_inodes={inodes}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(run)], check=True)
        try:
            unit.start()
            assert unit.eventually(partial(settled, unit)), unit.log
            assert unit.process is not None
            outcomes.append(unit.process.poll())
            assert refused(caller), inodes
            unit.end()
        finally:
            subprocess.run(["umount", str(run)], check=True)
    assert outcomes[0] == 1
    assert outcomes[-1] is None
    assert f"{run}/{unit.name}" in unit.log
    assert "No space left on device" in unit.log
    assert "Traceback" not in unit.log


def test_a_full_disk(unit: Unit, caller: Caller, tmp_path: Path) -> None:
    """The hooks are compiled though they cannot be kept."""
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k,mode=755", "none", str(full)], check=True
    )
    try:
        (full / "filler").write_bytes(b"x" * 12288)
        unit.cache = full
        unit.start()
        assert unit.hears("READY=1", 180), unit.log
        assert refused(caller)
        assert "cannot save the compiled hooks" in unit.log
        unit.end()
        assert {each.name for each in full.glob("*.json")} <= {f"{unit.name}.cgroups.json"}
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_the_status_is_one_document(unit: Unit) -> None:
    unit.start()
    assert unit.hears("READY=1"), unit.log
    done = subprocess.run(
        [sys.executable, "-m", "ipsecgate", *unit.argv("--json", "status")],
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, "without IKE it is degraded"
    assert "IKE" in json.loads(done.stdout)["errors"][0]


def test_a_full_disk_keeps_what_was_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    path = folder / "x.children.json"
    there = TrafficSelector(THERE[4])
    child = ChildConfig(ChildName("peer", "net"), Mode.TUNNEL, (), (there,))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k,mode=755", "none", str(folder)], check=True
    )
    try:
        keep(path, (child,))
        (folder / "filler").write_bytes(b"x" * 4096)
        many = tuple(replace(child, name=ChildName("peer", f"c{number}")) for number in range(200))
        with pytest.raises(OSError, match="No space left"):
            keep(path, many)
        assert recall(path) == (child,)
        assert {each.name for each in folder.iterdir()} == {path.name, "filler"}
    finally:
        subprocess.run(["umount", str(folder)], check=True)
