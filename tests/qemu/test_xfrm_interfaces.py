"""A route-based tunnel through an XFRM interface, on real ESP. user-mode-linux has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab
from tests.system.conftest import cache, gate, lab
from tests.system.one_call import INNER_B, PORT, REFUSED, call, ip, load_route_based
from tests.system.under_exec import nothing_in_clear
from tests.until import wait_until

__all__ = ["cache", "gate", "lab"]

IF_ID = 5

pytestmark = pytest.mark.skipif(
    "User Mode Linux" in Path("/proc/cpuinfo").read_text(),
    reason="missing: XFRM interfaces in user-mode-linux",
)


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-xfrmi") as made:
        made.warm_up(("tunnel",), (4,))
        made.b.serve("tcp-server", PORT)
        ip(made, "rule del pref 220", f"link add xfrm5 type xfrm dev eth0 if_id {IF_ID}")
        ip(made, "link set xfrm5 up", f"route replace {INNER_B} dev xfrm5 src 198.51.100.1")
        yield made


@pytest.fixture(scope="module")
def module_gate(module_lab: Lab, cache: Path) -> Iterator[Gated]:
    policy = f'[[policy]]\nname = "site"\nremote = ["{INNER_B}"]\n'
    with Gated(module_lab, policies=policy, cache=cache) as made:
        yield made


@pytest.mark.parametrize("source", ["", "198.51.100.1"])
def test_the_first_call_is_held_and_covered(lab: Lab, gate: Gated, source: str) -> None:
    load_route_based(lab, "xfrmi", if_id_in=str(IF_ID), if_id_out=str(IF_ID))
    with nothing_in_clear(lab, esp=True):
        assert call(lab, gate, source=source) == [None, "198.51.100.1"]
    assert gate.reasons()["block_clear"] == 0


def test_another_interface_id_protects_nothing(lab: Lab, gate: Gated) -> None:
    load_route_based(lab, "other", if_id_in="6", if_id_out="6")
    lab.a.charon.initiate("other")
    with nothing_in_clear(lab, esp=False):
        assert call(lab, gate, held="2s")[0] in REFUSED


def test_a_route_beside_the_interface_is_refused(lab: Lab, gate: Gated) -> None:
    load_route_based(lab, "xfrmi", if_id_in=str(IF_ID), if_id_out=str(IF_ID))
    assert call(lab, gate)[0] is None
    lab.let_tcp_close()  # else the other host repeats its FIN
    ip(lab, f"route replace {INNER_B} via 192.0.2.2 src 198.51.100.1")
    try:
        with nothing_in_clear(lab, esp=False):
            wait_until(lambda: call(lab, gate, held="1s")[0] in REFUSED, "beside it")
    finally:
        ip(lab, f"route replace {INNER_B} dev xfrm5 src 198.51.100.1")
