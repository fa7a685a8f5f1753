"""Measure the first connection to a protected peer, without and with the gate.

Every figure comes from the network or the kernel, none from the gate: SYN retransmissions are
host a's TcpExt counter, the receiver counts datagrams, a capture between the hosts counts
cleartext packets, and "SA ready" is the kernel's XFRM notification. Times are CLOCK_MONOTONIC,
which all hosts share.

Without the gate: strongSwan's trap policy and the kernel's defaults.
With the gate: the same, but the client is in a gated cgroup and retries every millisecond while
it is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from ipsecgate.edges.bpf import bytecode
from ipsecgate.lab.endpoints import Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import FAMILIES, MODES, ConnSpec, Lab
from ipsecgate.lab.xfrm_events import POLICY_ADDED

PORT = 7000
DATAGRAMS = 200
RATE = 1000
PROTOCOLS = ("tcp", "udp")
CLIENT_LIMIT = 20.0
SETTLE = 0.3
SA_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Case:
    """One first connection."""

    protocol: str
    family: int
    mode: str
    gated: bool

    def __str__(self) -> str:
        return f"{self.protocol.upper()} over IPv{self.family}, {self.mode} mode"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The measurements of a case. Times in milliseconds; None if it did not happen or apply.

    `sa_ready`: from the first attempt until the kernel had the outbound SA.
    `policy_ready`: until the kernel had the SA's own policy, which takes precedence over the trap.
    `connected`: until the connection was established (TCP) or the first sendto() succeeded (UDP).
    `released`: from that policy to the start of the attempt that succeeded; negative if the attempt
    began earlier (with a trap, the SA alone protects the flow).
    """

    case: Case
    attempts: int
    refused: int
    syn_retransmissions: int
    datagrams_lost: int | None
    clear_packets: int
    esp_packets: int
    sa_ready: float | None
    policy_ready: float | None
    connected: float | None
    released: float | None
    error: str | None


Progress = Callable[[str], None]


def cases(
    protocols: Sequence[str] = PROTOCOLS,
    families: Sequence[int] = FAMILIES,
    modes: Sequence[str] = MODES,
) -> list[Case]:
    """Return every combination. Those without the gate come first, while no hooks are loaded."""
    return [
        Case(protocol, family, mode, gated)
        for gated in (False, True)
        for mode, protocol, family in product(modes, protocols, families)
    ]


def measure_all(
    wanted: Sequence[Case], delay: float, progress: Progress = lambda _: None
) -> Generator[Outcome, None, None]:
    """Build the lab, run the cases in order, yield each outcome, remove the lab.

    `delay`: one way, in milliseconds. Raises: LabError.
    """
    with contextlib.ExitStack() as stack:
        progress("two hosts, each with its own strongSwan, and a path between them")
        lab = stack.enter_context(Lab())
        progress("one negotiation of each kind, to load the ciphers")
        lab.warm_up()
        lab.set_delay(delay)
        gate: Gated | None = None
        for case in wanted:
            if case.gated and gate is None:
                progress("the gate: hooks on one cgroup of host a, and the controller")
                hooks = Path(stack.enter_context(TemporaryDirectory(prefix=f"{lab.name}-hooks-")))
                bytecode.get(hooks)  # compile them first: `Gated` waits a limited time
                gate = stack.enter_context(Gated(lab, cache=hooks))
            progress(f"{case}, {'with' if case.gated else 'without'} the gate")
            yield measure(lab, case, gate if case.gated else None)


def measure(lab: Lab, case: Case, gate: Gated | None) -> Outcome:
    """Measure one case on an idle lab. Raises: LabError."""
    lab.reset()
    spec = ConnSpec(f"{case.mode}-{case.family}", case.mode, case.family, start_action="trap")
    lab.load(spec)
    if gate is not None:
        gate.wait_policy(spec.name)
    server = lab.b.serve(f"{case.protocol}-server", PORT)
    before = lab.a.counters()
    with server, lab.record() as recorder, lab.capture() as capture:
        client = lab.a.client(
            f"{case.protocol}-client",
            lab.b.address(spec),
            PORT,
            *("--limit", str(CLIENT_LIMIT)),
            *(("--count", str(DATAGRAMS), "--rate", str(RATE)) if case.protocol == "udp" else ()),
            cgroup=gate.cgroup if gate is not None else None,
        )
        report = client.result()
        received = server.report(DATAGRAMS if case.protocol == "udp" else 0, SETTLE)
        sa_ready = recorder.wait("NEWSA", timeout=SA_TIMEOUT)
        policy_ready = recorder.wait(*POLICY_ADDED, since=sa_ready or 0, timeout=SA_TIMEOUT)
        seen = capture.stop()
    after = lab.a.counters()
    return Outcome(
        case=case,
        attempts=report["attempts"],
        refused=sum(report["errnos"].values()),
        syn_retransmissions=after["TcpExtTCPSynRetrans"] - before["TcpExtTCPSynRetrans"],
        datagrams_lost=DATAGRAMS - received["distinct"] if case.protocol == "udp" else None,
        clear_packets=len(seen.clear),
        esp_packets=len(seen.esp),
        **_times(report, sa_ready, policy_ready),
        error=report["error"],
    )


def _times(
    report: Report, sa_ready: float | None, policy_ready: float | None
) -> dict[str, float | None]:
    """Return the times of an outcome from a client's report, in milliseconds."""
    first = report["first"]
    began = report.get("success_start", report["first_success"])
    ended = report.get("connected", report["first_success"])

    def since(start: float | None, end: float | None) -> float | None:
        return None if start is None or end is None else (end - start) * 1000

    return {
        "sa_ready": since(first, sa_ready),
        "connected": since(first, ended),
        "policy_ready": since(first, policy_ready),
        "released": since(policy_ready, began),
    }
