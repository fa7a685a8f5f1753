"""The gate on a kernel without IPv6; tests/guest/test_no_ipv6.py runs this in a guest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ipsecgate.lab.charon import Charon
from ipsecgate.lab.kernel import missing_feature
from tests.system.caller import Caller
from tests.system.controller_process import PORT, ControllerProcess, caller, controller, refused
from tests.system.event_recorder import ip
from tests.system.hooked_cgroup import HERE, OTHER, PEER

__all__ = ["caller", "controller"]

SA = f"src {HERE[4]} dst {PEER[4]} proto esp spi 0x100 mode transport"
POLICY = f"src {HERE[4]} dst {PEER[4]} dir out tmpl {SA}"
ALGORITHMS = f"enc cbc(aes) 0x{'11' * 16} auth hmac(sha256) 0x{'11' * 32}"


@pytest.fixture
def started(controller: ControllerProcess) -> Iterator[ControllerProcess]:
    """The controller, ready, beside a strongSwan without connections."""
    charon = Charon(controller.folder, ["nsenter", f"--net={controller.namespace.path}", "--"])
    charon.spawn()
    try:
        charon.wait_ready()
        controller.start()
        assert controller.hears("READY=1"), controller.log
        yield controller
    finally:
        charon.kill()


def test_the_lab_wants_another_kernel() -> None:
    assert missing_feature() == "IPv6"


def test_a_flow_is_refused_unless_an_sa_protects_it(
    started: ControllerProcess, caller: Caller
) -> None:
    assert caller("tcp", OTHER[4], PORT) == "EINPROGRESS", "no policy names it"
    assert refused(caller)
    xfrm = f"-n {started.namespace.name} xfrm"
    ip(f"{xfrm} policy add {POLICY}")
    ip(f"{xfrm} state add {SA} {ALGORITHMS}")
    assert started.eventually(lambda: not refused(caller)), started.log
    ip(f"{xfrm} state flush")
    assert started.eventually(lambda: refused(caller)), started.log


def test_the_screens_answer(started: ControllerProcess) -> None:
    """They ask the kernel for the routes, addresses and SAs of both families."""
    assert started.cli("status").returncode == 0
    assert "ok       esp" in started.cli("check").stdout
    assert started.cli("why", f"{PEER[4]}:{PORT}").returncode == 1, "refused"
    assert started.cli("why", f"[{PEER[6]}]:{PORT}").returncode == 0, "no policy names it"
