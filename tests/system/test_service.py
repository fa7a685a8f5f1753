"""The controller as a service: its watchdog, and the gate stays closed when it breaks.

A real process and real hooks; without an IKE daemon every protected flow is refused.
"""

from __future__ import annotations

import json
import os
import re
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
from ipsecgate.edges.host.saved_state import load_children, save_children
from tests.system.caller import Caller
from tests.system.controller_process import PORT, ControllerProcess, caller, controller, refused
from tests.system.hooked_cgroup import PEER, THERE

__all__ = ["caller", "controller"]


def test_the_service_manager_hears_ready_watchdog_and_stopping(
    controller: ControllerProcess, caller: Caller
) -> None:
    controller.start(env={"WATCHDOG_USEC": "200000"})
    assert controller.hears("READY=1"), controller.log
    status = "STATUS=protected flows are refused: strongSwan is not running"
    assert any(status in line for line in controller.heard)
    beats = []
    for _ in range(40):
        controller.heard.clear()
        assert controller.hears("WATCHDOG=1"), "also while nothing happens"
        beats.append(time.monotonic())
    assert beats[-1] - beats[0] > 0.05 * len(beats), "no more often than required"
    assert controller.process is not None
    controller.process.send_signal(signal.SIGTERM)
    assert controller.hears("STOPPING=1")
    assert controller.ended() == 0
    assert refused(caller)


STUCK = """
import asyncio
from ipsecgate.controller.controller import Controller
async def stuck(self, command):
    await asyncio.Event().wait()
Controller._execute = stuck
"""


def test_a_controller_stuck_in_a_decision_stops_its_watchdog(controller: ControllerProcess) -> None:
    controller.start(code=STUCK, env={"WATCHDOG_USEC": "200000"})
    assert controller.eventually(lambda: controller.ask()["pid"]), (
        "the rest of the controller works"
    )
    assert not controller.hears("WATCHDOG=1", 1)


CALLBACK = """
from ipsecgate.edges.bpf import datapath
def defect(record):
    raise LookupError("a defect in a callback")
datapath.packed.unpack_event = defect
"""
TASK = """
from ipsecgate.edges.kernel import routes
async def defect(self):
    raise LookupError("a defect in a task")
routes.Routes._update = defect
"""
STEP = """
from ipsecgate.core.gate.gate import Gate
def defect(self, *events, **more):
    raise LookupError("a defect in a decision")
Gate.step = defect
"""


@pytest.mark.parametrize("code", [CALLBACK, TASK, STEP], ids=["callback", "task", "decision"])
def test_an_unexpected_exception_ends_the_process_and_opens_nothing(
    controller: ControllerProcess, caller: Caller, code: str
) -> None:
    controller.start(code=code)
    assert controller.process is not None
    deadline = time.monotonic() + 30
    while controller.process.poll() is None:
        assert time.monotonic() < deadline, controller.log
        caller("tcp", PEER[4], PORT)
        time.sleep(0.02)
    assert controller.ended() == 1
    assert "LookupError: a defect in a" in controller.log
    assert refused(caller)
    controller.start()
    assert controller.hears("READY=1"), controller.log
    assert refused(caller)


def test_clients_cannot_take_all_descriptors(controller: ControllerProcess, caller: Caller) -> None:
    """Clients of the control socket leave descriptors for the kernel and IKE."""
    controller.start(files=64)
    assert controller.hears("READY=1"), controller.log
    path = controller.folder / "run" / controller.name / "control.sock"
    with ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(os.fspath(path))
        assert refused(caller)
        time.sleep(0.5)
    assert controller.process is not None
    assert controller.process.poll() is None, controller.log
    assert controller.eventually(lambda: controller.ask()["ready"]), "clients are accepted again"


def test_too_few_descriptors_at_start_open_nothing(
    controller: ControllerProcess, caller: Caller
) -> None:
    controller.start()
    assert controller.hears("READY=1"), controller.log
    controller.end()
    for files in range(8, 40, 4):
        controller.start(files=files)
        assert controller.eventually(partial(settled, controller)), files
        assert refused(caller), files
        controller.end()
    assert "Too many open files" in controller.log


def settled(controller: ControllerProcess) -> bool:
    """Return whether a controller that was started is ready or has ended."""
    assert controller.process is not None
    return controller.process.poll() is not None or controller.ask()["ready"]


def test_a_full_run_folder_opens_nothing(controller: ControllerProcess, caller: Caller) -> None:
    """Whichever file does not fit: the controller ends with an error, or works without it."""
    run = controller.folder / "run"
    run.mkdir()
    controller.start()
    assert controller.hears("READY=1"), controller.log
    controller.end()
    outcomes = []
    for inodes in range(2, 10):
        options = f"nr_inodes={inodes}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(run)], check=True)
        try:
            controller.start()
            assert controller.eventually(partial(settled, controller)), controller.log
            assert controller.process is not None
            outcomes.append(controller.process.poll())
            assert refused(caller), inodes
            controller.end()
        finally:
            subprocess.run(["umount", str(run)], check=True)
    assert outcomes[0] == 1
    assert outcomes[-1] is None
    assert f"{run}/{controller.name}" in controller.log
    assert "No space left on device" in controller.log
    assert "Traceback" not in controller.log


def test_the_hooks_load_although_a_full_disk_cannot_keep_them(
    controller: ControllerProcess, caller: Caller, tmp_path: Path
) -> None:
    """They are compiled at every start."""
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k,mode=755", "none", str(full)], check=True
    )
    try:
        (full / "filler").write_bytes(b"x" * 12288)
        controller.cache = full
        controller.start()
        assert controller.hears("READY=1", 180), controller.log
        assert refused(caller)
        assert "cannot save the compiled hooks" in controller.log
        controller.end()
        assert {each.name for each in full.glob("*.json")} <= {f"{controller.name}.cgroups.json"}
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_the_status_is_one_json_document(controller: ControllerProcess) -> None:
    controller.start()
    assert controller.hears("READY=1"), controller.log
    done = subprocess.run(
        [sys.executable, "-m", "ipsecgate", *controller.argv("--json", "status")],
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, "without IKE it is degraded"
    error = json.loads(done.stdout)["errors"][0]
    assert error["text"].startswith(f"strongSwan is not running ({controller.folder}/vici: ")
    assert "systemctl start strongswan" in error["advice"]


def test_a_full_disk_keeps_the_saved_children(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    path = folder / "x.children.json"
    there = TrafficSelector(THERE[4])
    child = ChildConfig(ChildName("peer", "net"), Mode.TUNNEL, (), (there,))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k,mode=755", "none", str(folder)], check=True
    )
    try:
        save_children(path, (child,))
        (folder / "filler").write_bytes(b"x" * 4096)
        many = tuple(replace(child, name=ChildName("peer", f"c{number}")) for number in range(200))
        with pytest.raises(OSError, match="No space left"):
            save_children(path, many)
        assert load_children(path) == (child,)
        assert {each.name for each in folder.iterdir()} == {path.name, "filler"}
    finally:
        subprocess.run(["umount", str(folder)], check=True)


BLOCKED = """
from ipsecgate.admin import loader
from ipsecgate.controller import targets
from ipsecgate.errors import GateError
attach = loader.attach_path
def attach_path(paths, path):
    if path.name == "blocked":
        raise GateError("another tool's program is there")
    attach(paths, path)
loader.attach_path = attach_path
targets.POLL = 0.05
"""


def test_what_repeats_is_said_once_and_its_count_at_the_end(
    controller: ControllerProcess, caller: Caller
) -> None:
    """The controller tries again to gate a cgroup, here 20 times a second."""
    blocked = controller.cgroup / "blocked"
    blocked.mkdir()
    try:
        text = controller.config.read_text()
        controller.config.write_text(text.replace("cgroups = [", f'cgroups = ["{blocked}", '))
        controller.start(code=BLOCKED)
        assert controller.hears("READY=1"), controller.log
        for _ in range(100):
            assert refused(caller)
            time.sleep(0.03)
        assert controller.log.count("another tool's program is there") == 1, controller.log
        events = json.loads(controller.cli("--json", "events").stdout)
        assert len([event for event in events if event["kind"] == "refused"]) == 1
        assert controller.process is not None
        controller.process.send_signal(signal.SIGTERM)
        assert controller.ended() == 0
    finally:
        blocked.rmdir()
    for what in (
        "another tool's program is there",
        f"tcp {PEER[4]}:{PORT}: no live SA protects it",
    ):
        (count,) = re.findall(rf"{re.escape(what)}; again, (\d+) times in \d+ s", controller.log)
        assert int(count) > 10, controller.log
