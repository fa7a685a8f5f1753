"""Metrics, dashboard and `top` on real hosts: a Prometheus scrapes a gate; top runs in a tty."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ipsecgate.admin.top_document import Top
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.connections import load_connection
from tests.typed_document import mismatches
from tests.unit.test_monitoring import METRIC, RULES, queries
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

PORT = 7300
LISTEN = "127.0.0.1:9765"
PROMETHEUS = "127.0.0.1:9090"


@pytest.fixture(scope="module")
def gate(cache: Path) -> Iterator[Gated]:
    with Lab("ipsecgate-test-monitoring") as lab, Gated(lab, cache=cache) as made:
        lab.b.serve("tcp-server", PORT)
        yield made


@pytest.fixture(scope="module")
def spec(gate: Gated) -> ConnSpec:
    """A connection whose first flow was refused, and then covered."""
    found = load_connection(gate.lab, gate)
    address = gate.lab.b.address(found)
    report = gate.lab.a.client("tcp-client", address, PORT, cgroup=gate.cgroup).result()
    assert report["echoed"]
    return found


def scraped(gate: Gated) -> dict[str, float]:
    """Return the values of one scrape: name{labels} as the text has it."""
    text = gate.cli("metrics").stdout
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    return {
        f"{sample.name}{json.dumps(sample.labels)}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_metrics_are_what_happened(gate: Gated, spec: ConnSpec) -> None:
    found, reasons = scraped(gate), gate.reasons()
    policy = json.dumps({"policy": f"{spec.name}/{spec.child_name}"})
    ended = json.dumps({"outcome": "established", "policy": f"{spec.name}/{spec.child_name}"})
    uncovered = json.dumps({"reason": "uncovered", "result": "refused"})
    assert found["ipsecgate_controller_up{}"] == 1
    assert found[f"ipsecgate_decisions_total{uncovered}"] == reasons["refuse_uncovered"] > 0
    assert found[f"ipsecgate_policy_covered{policy}"] == 1
    assert 0 < found[f"ipsecgate_policy_refusals_total{policy}"] <= reasons["refuse_uncovered"]
    assert found[f"ipsecgate_negotiations_total{ended}"] == 1
    assert found[f"ipsecgate_time_to_covered_seconds_count{policy}"] >= 1
    assert found["ipsecgate_sas{}"] == 1
    assert not [name for name in found if str(gate.lab.b.address(spec)) in name]


def test_a_prometheus_answers_every_query_of_the_dashboard(
    gate: Gated, spec: ConnSpec, tmp_path: Path
) -> None:
    job = {"job_name": "ipsecgate", "static_configs": [{"targets": [LISTEN]}]}
    config = tmp_path / "prometheus.yml"  # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(RULES)],
                "scrape_configs": [job],
            }
        )
    )
    exporter = gate.lab.a.popen(gate.argv("metrics", "--listen", LISTEN))
    words = (f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data")
    with (tmp_path / "log").open("w") as log:
        prometheus = gate.lab.a.popen(
            ["prometheus", *words, f"--web.listen-address={PROMETHEUS}"], stdout=log, stderr=log
        )
    try:
        scrapes = "count_over_time(ipsecgate_controller_up[5m])"
        wait_until(lambda: any(float(v) >= 3 for v in asked(gate, scrapes)), "nothing was scraped")
        for query in queries():
            values = asked(gate, query)
            # These two have a value only where there is something to show.
            assert values or query.endswith(("== 0", "> 0")), query
        for name in set(METRIC.findall(RULES.read_text())):
            assert asked(gate, name), name
        assert asked(gate, 'ALERTS{alertname="IpsecgateControllerDown"}') == []
        gate.kill()
        dead = scraped(gate)
        assert dead["ipsecgate_controller_up{}"] == 0
        assert dead["ipsecgate_hooks_up{}"] == 1
        assert "ipsecgate_sas{}" not in dead
        pending = 'ALERTS{alertname="IpsecgateControllerDown"}'
        wait_until(lambda: asked(gate, pending), "the alert does not see it")
    finally:
        for process in (prometheus, exporter):
            process.terminate()
            process.wait()
    assert exporter.returncode == 0
    gate.start()


def asked(gate: Gated, query: str) -> list[str]:
    """Return the values that Prometheus answers with; none if it is not ready."""
    url = f"http://{PROMETHEUS}/api/v1/query?{urlencode({'query': query})}"
    with gate.lab.a.namespace.inside():
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                document = json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
                return []  # it is starting
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionError):
                return []  # it does not listen yet
            raise
    assert document["status"] == "success", document
    return [result["value"][1] for result in document["data"]["result"]]


# --- top ----------------------------------------------------------------------------------------


class Terminal:
    """A program in a terminal of its own, of 80 columns and 24 lines."""

    def __init__(self, argv: list[str]) -> None:
        self.pid, self.master = pty.fork()
        if not self.pid:
            try:
                os.execvpe(
                    argv[0], argv, {**os.environ, "TERM": "xterm", "COLUMNS": "", "LINES": ""}
                )
            finally:
                os._exit(127)
        self.resize(80, 24)
        self.modes = termios.tcgetattr(self.master)
        self.output = ""
        self.ended: int | None = None

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def press(self, key: str) -> None:
        self.output = ""
        os.write(self.master, key.encode())

    def shows(self, text: str, within: float = 60.0) -> bool:
        """Wait until the output since the last key has this text."""
        deadline = time.monotonic() + within
        while text not in self.screen():
            if time.monotonic() > deadline or not self._read():
                return text in self.screen()
        return True

    def screen(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output)

    def _read(self) -> bool:
        ready, _, _ = select.select([self.master], [], [], 1.0)
        try:
            self.output += os.read(self.master, 1 << 16).decode() if ready else ""
        except OSError:
            return False  # the program has ended
        return True

    def end(self, within: float = 60.0) -> int:
        """Wait for the end of the program, and return its exit code."""
        deadline = time.monotonic() + within
        while (found := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, "it did not end"
            self._read()
        while self._read() and select.select([self.master], [], [], 0)[0]:
            pass
        return os.waitstatus_to_exitcode(found[1])

    def is_restored(self) -> bool:
        """Tell whether the terminal has its modes, its content and its cursor back."""
        same = termios.tcgetattr(self.master) == self.modes
        return same and self.output.rfind("\x1b[?1049l") > self.output.rfind("\x1b[?1049h")


def test_top_in_a_terminal(gate: Gated, spec: ConnSpec) -> None:
    terminal = Terminal(gate.argv("top", "--interval", "0.3"))
    try:
        assert terminal.shows(spec.name), terminal.output
        assert terminal.shows("controller running")
        assert terminal.shows("q quit")
        terminal.press("c")
        assert terminal.shows("unit or cgroup")
        terminal.press("h")
        assert terminal.shows("by cgroup and process")
        terminal.press("p")  # leaves the help
        terminal.press("p")
        assert terminal.shows("covered")
        terminal.press(" ")
        assert terminal.shows("paused")
        terminal.press(" ")
        terminal.resize(140, 30)
        assert terminal.shows("last refused flow")
        gate.kill()
        terminal.press("s")
        assert terminal.shows("controller not running"), terminal.screen()
        gate.start()
        terminal.press("s")
        assert terminal.shows("controller running"), terminal.screen()
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.is_restored()
    finally:
        os.close(terminal.master)


def test_top_leaves_the_terminal_as_it_was_when_it_is_terminated(gate: Gated) -> None:
    terminal = Terminal(gate.argv("top"))
    assert terminal.shows("q quit")
    assert termios.tcgetattr(terminal.master) != terminal.modes, "it reads single keys"
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.end() == 128 + signal.SIGTERM
    assert terminal.is_restored()
    os.close(terminal.master)


def test_top_for_scripts(gate: Gated, spec: ConnSpec) -> None:
    document: dict[str, Any] = json.loads(gate.cli("--json", "top", "--interval", "0.2").stdout)
    assert mismatches(document, Top) == []
    policies = {row["policy"]: row for row in document["policies"]}
    assert policies[f"{spec.name}/{spec.child_name}"]["coverage"] == "covered"
    assert [row["cgroup"] for row in document["cgroups"]] == [str(gate.cgroup)]
    assert spec.name in gate.cli("top", "--once", "--interval", "0.2").stdout
    refused = gate.cli("top", check=False)
    assert refused.returncode == 2
    assert "--once" in refused.stderr
    gate.kill()
    done = gate.cli("--json", "top", "--interval", "0.2", check=False)
    assert (done.returncode, json.loads(done.stdout)["controller"]) == (3, False)
