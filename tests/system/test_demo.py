"""`ipsecgate demo` on a kernel with ESP: its report, and that it always cleans up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from ipsecgate.edges.host import cgroups
from ipsecgate.lab.netns import RUN

DEMO = (sys.executable, "-m", "ipsecgate", "--json", "demo", "--mode", "tunnel")


def left_behind() -> set[str]:
    """Return every trace of a lab that exists now."""
    places = (RUN, cgroups.root(), Path("/tmp"), Path("/sys/fs/bpf/ipsecgate"))
    found = {str(p) for place in places if place.is_dir() for p in place.glob("*lab-*")}
    # Daemons of the host and of parallel tests have other IPC namespaces.
    ours = ["--ns", str(os.getpid()), "--nslist", "ipc"]
    charons = subprocess.run(
        ["pgrep", *ours, "-f", "charon-systemd"], capture_output=True, check=False
    )
    return found | set(charons.stdout.decode().split())


def test_the_demo_reports_its_cases_and_leaves_nothing_behind() -> None:
    before = left_behind()
    run = subprocess.run(DEMO, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    cases = document["cases"]
    assert len(cases) == 8
    for case in cases:
        assert case["error"] is None
        assert case["clear_packets"] == 0
        assert case["sa_ready"] > 0
        tcp = case["case"]["protocol"] == "tcp"
        if case["case"]["gated"]:
            assert (case["syn_retransmissions"], case["datagrams_lost"] or 0) == (0, 0)
            assert case["refused"] > 0
        else:
            assert (case["syn_retransmissions"] if tcp else case["datagrams_lost"]) > 0
    assert left_behind() <= before


def test_an_interrupted_demo_leaves_nothing_behind() -> None:
    before = left_behind()
    with subprocess.Popen(DEMO, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr
        for line in demo.stderr:
            if "TCP over IPv4, tunnel mode, with the gate" in line:
                break
        assert left_behind() - before
        demo.send_signal(signal.SIGINT)
        said = demo.stderr.read()
        assert demo.wait(30) == 130, said
    assert left_behind() <= before
