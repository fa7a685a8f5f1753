"""A flow whose SA goes is closed while the controller does something that takes long.

Each test makes that take as long as the test needs: the IKE daemon does not answer at a start, or a
large change does not go on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipsecgate.errors import NoControllerError
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab
from tests.system.caller import Caller
from tests.system.connections import load_connection
from tests.system.hooked_cgroup import went_out
from tests.system.under_exec import stopped
from tests.until import wait_until

PORT = 7110
NETLINK_XFRM = "6"
MANY = 2000  # destinations of a policy, so that publishing it has pauses
# Runs a controller that waits for the IKE daemon without a limit.
PATIENT = """
import sys
from ipsecgate.controller import ike_follower
from ipsecgate.edges.strongswan import client
ike_follower.CONNECT = client.COMMAND_LIMIT = 3600.0
from ipsecgate.cli import main
main(sys.argv[1:])
"""
# Runs a controller that stays in a pause of a large change while a file exists.
SLOW = """
import asyncio, sys
from pathlib import Path
from ipsecgate.edges.bpf.tables import Tables
pause = Tables._pause
async def stay(self):
    await pause(self)
    while Path({file!r}).exists():
        Path({file!r}).write_text("stays")
        await asyncio.sleep(0.01)
        await pause(self)
Tables._pause = stay
from ipsecgate.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-meanwhile") as lab:
        lab.warm_up()
        lab.b.serve("tcp-server", PORT)
        yield lab


@pytest.fixture
def caller(lab: Lab, gate: Gated) -> Iterator[Caller]:
    caller = Caller(lab.a.namespace.path, gate.cgroup)
    yield caller
    caller.close()


def tunnels(lab: Lab, gate: Gated, caller: Caller) -> dict[int, str]:
    """Return the addresses of both families behind SAs that are up."""
    specs = {family: load_connection(lab, gate, "tunnel", family) for family in (4, 6)}
    to = {family: str(lab.b.address(spec)) for family, spec in specs.items()}
    for address in to.values():
        wait_until(lambda a=address: went_out(caller("tcp", a, PORT)), "no SA")  # type: ignore[misc]
    return to


def start(lab: Lab, gate: Gated, code: str) -> None:
    """Start a controller with some code in front of it."""
    with gate.log.open("a") as log:
        words = [sys.executable, "-P", "-c", code, *gate.argv("run")[4:]]
        gate.process = lab.a.popen(words, stdout=log, stderr=log)


def is_ready(gate: Gated) -> bool:
    try:
        return bool(gate.ask()["ready"])
    except NoControllerError:
        return False


def listeners(lab: Lab) -> int:
    """Return how many sockets receive XFRM's notifications in host a's namespace."""
    lines = lab.a.run(["cat", "/proc/net/netlink"]).stdout.splitlines()[1:]
    return sum(one.split()[1] == NETLINK_XFRM and int(one.split()[3], 16) != 0 for one in lines)


@contextmanager
def nothing_in_clear(lab: Lab) -> Iterator[None]:
    with lab.capture() as capture:
        yield
        seen = capture.stop()
    assert not seen.clear


def closes_one(lab: Lab, caller: Caller, to: dict[int, str]) -> None:
    """Delete the SA of one flow, and wait until that is refused; the other goes on."""
    for address in to.values():
        assert went_out(caller("tcp", address, PORT))
    ends = ["src", str(lab.a.outer[4]), "dst", str(lab.b.outer[4])]
    lab.a.run(["ip", "xfrm", "state", "deleteall", *ends])
    wait_until(lambda: caller("tcp", to[4], PORT) == "EPERM", "it stays open")
    assert went_out(caller("tcp", to[6], PORT))


def test_while_a_controller_starts(lab: Lab, gate: Gated, caller: Caller) -> None:
    to = tunnels(lab, gate, caller)
    with nothing_in_clear(lab):
        gate.kill()
        before = listeners(lab)
        with stopped(lab):
            start(lab, gate, PATIENT)
            wait_until(lambda: listeners(lab) > before, "it does not listen")
            time.sleep(0.2)  # whatever it does first
            closes_one(lab, caller, to)
            assert not gate.ask()["ready"]
        wait_until(lambda: is_ready(gate), "it never starts")
        assert went_out(caller("tcp", to[6], PORT))


def test_if_it_went_while_no_controller_ran(lab: Lab, gate: Gated, caller: Caller) -> None:
    """The kernel's dump does not have it."""
    to = tunnels(lab, gate, caller)
    with nothing_in_clear(lab):
        gate.kill()
        ends = ["src", str(lab.a.outer[4]), "dst", str(lab.b.outer[4])]
        lab.a.run(["ip", "xfrm", "state", "deleteall", *ends])
        assert went_out(caller("tcp", to[4], PORT))
        with stopped(lab):
            start(lab, gate, PATIENT)
            wait_until(lambda: caller("tcp", to[4], PORT) == "EPERM", "it stays open")
            assert went_out(caller("tcp", to[6], PORT))
            assert not gate.ask()["ready"]
        wait_until(lambda: is_ready(gate), "it never starts")
        assert went_out(caller("tcp", to[6], PORT))


def test_while_a_large_change_is_written(
    lab: Lab, gate: Gated, caller: Caller, tmp_path: Path
) -> None:
    """Half of the change is not in force meanwhile: what it discards goes on."""
    to = tunnels(lab, gate, caller)
    stays, configuration = tmp_path / "stays", gate.config.read_text()
    many = [f"10.200.{n >> 8}.{n & 255}/32" for n in range(MANY)]
    gate.kill()
    start(lab, gate, SLOW.format(file=str(stays)))
    wait_until(lambda: is_ready(gate), "it never starts")
    for address in to.values():
        wait_until(lambda a=address: went_out(caller("tcp", a, PORT)), "not open")  # type: ignore[misc]
    try:
        gate.config.write_text(
            f'{configuration}\n[[policy]]\nname = "many"\nremote = {many}\naction = "protect"\n'
            f'[[policy]]\nname = "six"\nremote = ["{to[6]}/128"]\naction = "discard"\n'
            f'[[policy]]\nname = "four"\nremote = ["{to[4]}/32"]\naction = "protect"\n'
        )
        stays.write_text("")
        with nothing_in_clear(lab):
            reload = lab.a.popen(gate.argv("reload"), stderr=subprocess.PIPE)
            wait_until(lambda: stays.read_text() == "stays", "it does not write")
            closes_one(lab, caller, to)
            assert reload.poll() is None
            stays.unlink()
            _, errors = reload.communicate(timeout=120)
        assert reload.returncode == 0, errors
        assert caller("tcp", to[6], PORT) == "EPERM"
    finally:
        stays.unlink(missing_ok=True)
        gate.config.write_text(configuration)
        gate.kill()
        gate.start()
