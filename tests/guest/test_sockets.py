"""List and destroy open sockets, on this kernel: the test kernel lacks INET_DIAG_DESTROY."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from ipsecgate.core.codec.sockdiag import ListedSocket
from ipsecgate.core.model.flow import TCP, UDP
from ipsecgate.edges.kernel import sockets
from tests.matrix.features import ends_sockets
from tests.system.hooked_cgroup import OTHER, PEER, HookedCgroup

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="missing: root")


@pytest.fixture(scope="module", autouse=True)
def _destroys() -> None:
    if not ends_sockets():
        pytest.skip("missing: INET_DIAG_DESTROY in the kernel")


@pytest.fixture(autouse=True)
def inside(hooked: HookedCgroup) -> object:
    with hooked.namespace.inside():
        yield


def listed(wanted: Callable[[ListedSocket], bool]) -> list[ListedSocket]:
    return [one for one in asyncio.run(sockets.connected()) if wanted(one)]


@pytest.mark.parametrize(("call", "proto"), [("kept connected 4", UDP), ("kept tcp", TCP)])
def test_destroy_ends_only_the_given_socket(hooked: HookedCgroup, call: str, proto: int) -> None:
    assert hooked.gated(call, OTHER[4]) in ("", "EINPROGRESS")
    assert hooked.free(call, OTHER[4]) in ("", "EINPROGRESS")
    both = listed(lambda one: (str(one.flow.daddr), one.flow.proto) == (OTHER[4], proto))
    ours = [one for one in both if one.cgroup == hooked.cgroup.stat().st_ino]
    assert (len(both), len(ours)) == (2, 1)
    assert ours[0].flow.dport == 80
    assert ours[0].flow.saddr is not None
    assert asyncio.run(sockets.destroy(ours)) == 1
    # A destroyed UDP socket has no peer any more. A blocked call would also get ECONNABORTED.
    assert hooked.gated(call, OTHER[4]) == ("ECONNABORTED" if proto == TCP else "EDESTADDRREQ")
    assert hooked.free(call, OTHER[4]) in ("", "EALREADY")
    assert asyncio.run(sockets.destroy(ours)) == 0, "it is gone"
    hooked.gated.forget()
    hooked.free.forget()


def test_a_mapped_socket_is_listed_as_ipv4(hooked: HookedCgroup) -> None:
    assert hooked.free("kept connected 6", f"::ffff:{PEER[4]}") == ""
    (one,) = listed(lambda one: str(one.flow.daddr) == PEER[4])
    assert asyncio.run(sockets.destroy([one])) == 1
    assert hooked.free("kept connected 6", f"::ffff:{PEER[4]}") == "EDESTADDRREQ"
    hooked.free.forget()
