"""The lab's clients retry when the kernel refuses them with EPERM, and report it.

A blocking XFRM policy refuses them; no SA is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.lab import capture as capture_module
from ipsecgate.lab.hosts import Lab, LabError
from tests.until import wait_until

pytestmark = [
    pytest.mark.second_guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
]

TCP_PORT, UDP_PORT = 7000, 7001


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-traffic") as lab:
        yield lab


def policy(lab: Lab, *words: str) -> None:
    target = ["dst", f"{lab.b.outer[4]}/32", "dir", "out"]
    lab.a.run(["ip", "xfrm", "policy", words[0], *target, *words[1:]])


def wait_refused(lab: Lab, before: dict[str, int], times: int) -> None:
    enough = before["XfrmOutPolBlock"] + times
    wait_until(lambda: lab.a.counters()["XfrmOutPolBlock"] >= enough, "the client does not try")


@pytest.mark.parametrize("switch", [[], ["--same-socket"]], ids=["new", "same-socket"])
def test_the_tcp_client_retries_until_it_is_let_through(lab: Lab, switch: list[str]) -> None:
    before = lab.a.counters()
    with lab.b.serve("tcp-server", TCP_PORT) as server, lab.capture() as capture:
        policy(lab, "add", "action", "block")
        client = lab.a.client("tcp-client", lab.b.outer[4], TCP_PORT, *switch)
        wait_refused(lab, before, 20)
        opened = time.monotonic()
        policy(lab, "delete")
        report = client.result()
        assert server.report()["accepted"] == 1
        seen = capture.stop()
    assert report["echoed"], report
    assert report["error"] is None
    assert report["errnos"] == {"EPERM": report["attempts"] - 1}
    assert report["attempts"] > 20
    assert report["first"] < report["first_refused"] < opened
    assert opened < report["success_start"] < report["connected"] < report["finished"]
    assert report["first_success"] == report["success_start"]
    assert len(seen.syns) == 1, "no SYN left while it was refused"
    assert lab.a.counters()["TcpExtTCPSynRetrans"] == before["TcpExtTCPSynRetrans"]


@pytest.mark.parametrize("switch", [[], ["--connected"]], ids=["sendto", "connected"])
def test_the_udp_client_retries_and_loses_nothing(lab: Lab, switch: list[str]) -> None:
    before = lab.a.counters()
    with lab.b.serve("udp-server", UDP_PORT) as server:
        policy(lab, "add", "action", "block")
        client = lab.a.client("udp-client", lab.b.outer[4], UDP_PORT, "--count", "50", *switch)
        wait_refused(lab, before, 20)
        opened = time.monotonic()
        policy(lab, "delete")
        report = client.result()
        counted = server.report(expect=50, settle=3600)
    assert (report["sent"], report["error"]) == (50, None)
    assert counted["distinct"] == counted["received"] == 50
    calls = 51 if switch else 50
    assert report["errnos"] == {"EPERM": report["attempts"] - calls}
    assert report["first"] < opened < report["first_success"]
    # After the refusals it goes on at its rate, not in a burst.
    assert report["finished"] - report["first_success"] >= 49 / 1000


@pytest.mark.parametrize("role", ["tcp-client", "udp-client"])
def test_a_client_ends_at_its_limit_or_at_an_errno_that_is_not_retried(lab: Lab, role: str) -> None:
    policy(lab, "add", "action", "block")
    try:
        limit = lab.a.client(role, lab.b.outer[4], TCP_PORT, "--limit", "0.2").result()
        once = lab.a.client(role, lab.b.outer[4], TCP_PORT, "--retry", "none").result()
    finally:
        policy(lab, "delete")
    assert (limit["error"], once["error"]) == ("limit", "EPERM")
    assert (limit["first_success"], once["attempts"]) == (None, 1)


def test_a_client_binds_to_the_given_address(lab: Lab) -> None:
    with lab.b.serve("tcp-server", TCP_PORT, str(lab.b.bare[6])), lab.capture() as capture:
        bind = ["--bind", str(lab.a.inner[6])]
        report = lab.a.client("tcp-client", lab.b.bare[6], TCP_PORT, *bind).result()
        seen = capture.stop()
    assert report["local"][0] == str(lab.a.inner[6])
    assert [packet.saddr for packet in seen.syns] == [lab.a.inner[6]]


def test_the_server_counts_from_one_report_to_the_next(lab: Lab) -> None:
    with lab.b.serve("udp-server", UDP_PORT) as server:
        for count in (3, 5):
            options = ("--count", str(count))
            lab.a.client("udp-client", lab.b.outer[6], UDP_PORT, *options).result()
            assert server.report(expect=count, settle=3600)["distinct"] == count
        assert server.report(expect=1, settle=0.05)["distinct"] == 0


def test_a_frame_that_the_kernel_dropped_is_an_error(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "BUFFER", 1)
    with lab.b.serve("udp-server", UDP_PORT), lab.capture() as capture:
        lab.a.client("udp-client", lab.b.outer[4], UDP_PORT).result()
        with pytest.raises(LabError, match="lost"):
            capture.stop()


def test_an_unknown_argument_shows_the_usage() -> None:
    argv = [sys.executable, "-m", "ipsecgate.lab.traffic", "tcp-client", "--nonsense"]
    home = Path(__file__).parents[2]
    run = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=home)
    assert run.returncode == 2
    assert run.stderr.startswith("unknown argument: --nonsense\n")
    assert "udp-client --to" in run.stderr
