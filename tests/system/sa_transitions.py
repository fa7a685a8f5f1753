"""The lab in which tests change an SA under the traffic of a gated process (see `observation`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import ConnSpec, Lab
from ipsecgate.lab.recorder import Recorder
from tests.system.observation import Observation
from tests.system.prober import KINDS, Target

PORT, CLOSED_PORT = 7200, 7201
LONG = 100  # ms, one way: a gap must be longer than twice the tolerance
SPEC = ConnSpec("net", "tunnel", 4, start_action="trap")
TRANSPORT = ConnSpec("host", "transport", 6, start_action="trap")
Begin = Callable[..., Observation]
HOSTS = pytest.mark.parametrize("side", ["a", "b"])


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-observe") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.warm_up(("transport",), (6,))
        lab.b.serve("udp-server", PORT)
        yield lab


@pytest.fixture(scope="module")
def gate(module_lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(module_lab, cache=cache) as gate:
        for spec in (SPEC, TRANSPORT):
            module_lab.load(spec)
            gate.wait_policy(spec.name)
        yield gate


@pytest.fixture(scope="module")
def recorder(module_lab: Lab) -> Iterator[Recorder]:
    with module_lab.record() as recorder:
        yield recorder


def targets(lab: Lab, spec: ConnSpec = SPEC) -> list[Target]:
    """Return a target of each kind. The TCP port is closed, so a RST ends each connection."""
    address = str(lab.b.address(spec))
    return [(kind, address, CLOSED_PORT if kind == "tcp" else PORT, "") for kind in KINDS]


@pytest.fixture
def observe(lab: Lab, gate: Gated, recorder: Recorder, request: pytest.FixtureRequest) -> Begin:
    """Make a `Observation` whose process speaks under the SA of a connection already."""

    def begin(
        spec: ConnSpec = SPEC,
        to: Sequence[Target] = (),
        load: Callable[[ConnSpec], object] = lab.load,
    ) -> Observation:
        to = to or targets(lab, spec)
        return Observation(lab, gate, recorder, request.node.name, to, lambda: load(spec))

    return begin


def host(lab: Lab, side: str) -> Host:
    return lab.a if side == "a" else lab.b


@contextlib.contextmanager
def configured(one: Host, settings: str) -> Iterator[None]:
    """Apply these charon settings to the IKE_SAs that begin in the block."""
    one.charon.configure(settings)
    try:
        yield
    finally:
        one.charon.configure("")
