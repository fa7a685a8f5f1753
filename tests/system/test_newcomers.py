"""Processes in other network namespaces are noticed when they come into a gated cgroup."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipsecgate.edges.host import cgroups
from ipsecgate.edges.kernel.namespaces import inode
from tests.system.controller_process import ControllerProcess, caller, controller

__all__ = ["caller", "controller"]

pytestmark = pytest.mark.second_guest


@pytest.fixture
def folder(controller: ControllerProcess) -> Iterator[Path]:
    """A cgroup in which tests create others."""
    path = cgroups.root() / f"{controller.name}-tree"
    path.mkdir()
    yield path
    for inside, _, _ in os.walk(path, topdown=False):
        Path(inside).rmdir()


@contextmanager
def container(controller: ControllerProcess, cgroup: Path) -> Iterator[int]:
    """Run a process in a cgroup and in a network namespace of its own; yield its pid."""
    join = 'echo 0 >"$0" && exec unshare --net sleep 1000'
    process = subprocess.Popen(["sh", "-c", join, str(cgroup / "cgroup.procs")])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
        assert controller.eventually(lambda: not (cgroup / "cgroup.procs").read_text())


def noticed(controller: ControllerProcess) -> set[int]:
    return {item["pid"] for item in controller.ask()["namespaces"]}


def notices(controller: ControllerProcess, *pids: int) -> bool:
    """Wait until exactly these processes stand for the namespaces that are followed."""
    return controller.eventually(lambda: noticed(controller) == set(pids))


def start(controller: ControllerProcess, target: Path) -> None:
    controller.configure(f'cgroups = ["{target}"]\n')
    controller.start()
    assert controller.hears("READY=1"), controller.log


def test_containers_of_a_gated_slice(controller: ControllerProcess, folder: Path) -> None:
    start(controller, folder)
    for number in range(3):  # also when they are made again
        cgroup = folder / "machine" / f"container-{number % 2}"
        cgroup.mkdir(parents=True, exist_ok=True)
        with container(controller, cgroup) as pid:
            assert notices(controller, pid)
            beside = folder / "beside"
            beside.mkdir(exist_ok=True)
            with container(controller, beside) as other:
                assert notices(controller, pid, other)
        assert notices(controller), controller.log
        cgroup.rmdir()


def test_one_that_was_there_before(controller: ControllerProcess, folder: Path) -> None:
    with container(controller, folder) as pid:
        start(controller, folder)
        assert notices(controller, pid), controller.log


def test_one_in_a_cgroup_that_is_gated_later(controller: ControllerProcess, folder: Path) -> None:
    start(controller, controller.cgroup)
    with container(controller, folder) as pid:
        assert noticed(controller) == set()
        assert controller.cli("attach", str(folder)).returncode == 0
        assert notices(controller, pid), controller.log
        assert controller.cli("detach", str(folder)).returncode == 0
    assert notices(controller), controller.log


def test_another_process_stands_for_a_namespace(
    controller: ControllerProcess, folder: Path
) -> None:
    start(controller, folder)
    with container(controller, folder) as pid:
        assert notices(controller, pid), controller.log
        enter = ["nsenter", f"--net=/proc/{pid}/ns/net", "sleep", "1000"]
        join = 'echo 0 >"$0" && exec "$@"'
        cgroup = folder / "later"
        cgroup.mkdir()
        argv = ["sh", "-c", join, str(cgroup / "cgroup.procs"), *enter]
        second = subprocess.Popen(argv)
        try:
            assert controller.eventually(lambda: inode(second.pid) == inode(pid))
            os.kill(pid, 9)
            assert notices(controller, second.pid)
        finally:
            second.kill()
            second.wait()
    assert notices(controller), controller.log
