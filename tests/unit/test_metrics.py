"""The metrics: what they say, in the forms that scrapers ask for; and what they never say."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from ipsecgate.admin.status_document import Status
from ipsecgate.edges.host.listen import PATH_LIMIT, Listen
from ipsecgate.errors import GateError, UsageError
from ipsecgate.monitor import exporter
from ipsecgate.monitor.metrics import POLICIES, registry
from tests.unit.status_documents import policy, status


def scrape(read: Callable[[], Status]) -> str:
    return generate_latest(registry(read)).decode()


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return the values by name and the values of the labels, in the order of their names."""
    return {
        (
            sample.name.removeprefix("ipsecgate_"),
            tuple(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def test_promtool_finds_no_fault_with_the_names_and_texts() -> None:
    for document in (status(), status(controller={"alive": False, "pid": None, "since": None})):
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=scrape(lambda d=document: d),  # type: ignore[misc]
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    bad = "# TYPE ipsecgate_calls counter\nipsecgate_calls 1\n"
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=bad, capture_output=True, text=True, check=False
    )
    assert "_total" in done.stdout + done.stderr, "promtool does find faults"


def test_each_part_of_the_status_has_its_metric() -> None:
    found = samples(scrape(status))
    assert found["controller_up", ()] == found["hooks_up", ()] == 1
    assert found["controller_start_time_seconds", ()] == 500.25
    assert found["decisions_total", ("covered", "allowed")] == 2
    assert found["decisions_total", ("uncovered", "refused")] == 7
    assert found["blocked_packets_total", ("clear",)] == 14
    assert found["policies", ("protect", "covered")] == 1
    assert found["policies", ("protect", "negotiating")] == 0
    assert found["policies", ("bypass", "")] == 1
    assert (found["policy_covered", ("db",)], found["policy_covered", ("web",)]) == (1, 0)
    assert ("policy_covered", ("lan",)) not in found
    assert found["policy_refusals_total", ("db",)] == 5
    assert found["policy_refusals_total", ("",)] == 7
    assert found["policy_refusals_total", ("web",)] == 0, "so that the first one is an increase"
    assert found["negotiations_total", ("established", "db")] == 4
    assert found["negotiations_total", ("failed", "db")] == 0
    assert found["children", ("back-off",)] == 1
    assert found["held_calls", ()] == 1
    assert found["calls_held_total", ()] == 9
    assert found["table_entries", ("spd",)] == 5
    assert found["table_masks_limit", ("spd",)] == 2031
    assert found["drift_repaired_total", ("maps",)] == 2
    assert found["events_lost_total", ()] == 1
    assert found["hook_attachments", ("sendmsg6",)] == 1
    assert found["time_to_covered_seconds_bucket", ("0.1", "db")] == 2
    assert found["time_to_covered_seconds_bucket", ("+Inf", "db")] == 4
    assert found["time_to_covered_seconds_sum", ("db",)] == 2.5
    assert found["errors", ()] == 1


def test_without_a_controller_only_what_the_hooks_know_is_said() -> None:
    dead = status(controller={"alive": False, "pid": None, "since": None})
    found = samples(scrape(lambda: dead))
    assert found["controller_up", ()] == 0
    assert found["decisions_total", ("uncovered", "refused")] == 7
    names = {name for name, _ in found}
    assert not names & {"sas", "held_calls", "negotiations_total", "policy_refusals_total"}
    assert not any(name.startswith("time_to_covered") for name in names)


@pytest.mark.parametrize("error", [FileNotFoundError(), GateError("other layout"), OSError(1, "x")])
def test_a_gate_that_cannot_be_read_is_down_and_logged_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> Status:
        raise error

    found = registry(read)
    for _ in range(3):
        text = generate_latest(found).decode()
        assert samples(text)["hooks_up", ()] == samples(text)["controller_up", ()] == 0
    assert len(caplog.records) == 1


def test_no_label_has_an_address_a_process_or_a_foreign_text() -> None:
    text = scrape(status)
    for word in ("10.2", "10.3", "curl", "5432", "no proposal", "/sys/fs", "pid"):
        assert word not in text


def test_a_name_that_is_no_text_is_escaped() -> None:
    evil = status(policies=[policy('a"\udcff\n', "covered")])
    assert samples(scrape(lambda: evil))["policy_covered", ('a"\\udcff\\n',)] == 1


def test_only_so_many_policies_have_series_of_their_own() -> None:
    many = status(policies=[policy(f"p{n}", "covered") for n in range(POLICIES + 500)])
    found = samples(scrape(lambda: many))
    assert sum(name == "policy_covered" for name, _ in found) == POLICIES
    assert found["policies", ("protect", "covered")] == POLICIES + 500


def test_the_controller_loads_nothing_of_it() -> None:
    code = (
        "import sys, ipsecgate.controller.controller\n"
        "found = [m for m in sys.modules if m.startswith(('prometheus', 'ipsecgate.monitor'))]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the server ---------------------------------------------------------------------------------


@contextmanager
def served(path: Path) -> Iterator[None]:
    with exporter.listening(Listen(path=path), registry(status)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def get(path: Path, *headers: str) -> tuple[str, str]:
    """Return the head and the body of an answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        lines = ["GET /metrics HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]
        client.sendall("\r\n".join(lines).encode())
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head, body


def test_a_scraper_gets_the_form_that_it_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with served(path):
        head, body = get(path)
        assert head.startswith("HTTP/1.0 200 OK")
        assert "text/plain; version=0.0.4" in head
        assert samples(body)["controller_up", ()] == 1
        head, body = get(path, "Accept: application/openmetrics-text;version=1.0.0")
        assert "application/openmetrics-text; version=" in head
        families = parse_openmetrics(body)  # type: ignore[no-untyped-call]
        assert "ipsecgate_build" in {family.name for family in families}
        assert body.endswith("# EOF\n")
    assert not path.exists(), "the socket is removed at the end"


def test_a_silent_client_keeps_nobody_waiting(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with served(path), socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(path))
        assert samples(get(path)[1])["controller_up", ()] == 1


def test_only_a_socket_that_nobody_uses_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    path.write_text("mine")
    with pytest.raises(UsageError, match="not a socket"), served(path):
        pass
    assert path.read_text() == "mine"
    path.unlink()
    with served(path):
        with pytest.raises(UsageError, match="another program listens"), served(path):
            pass
        assert samples(get(path)[1])["controller_up", ()] == 1
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with served(path):
        assert samples(get(path)[1])["controller_up", ()] == 1
    with pytest.raises(GateError, match="cannot listen"), served(tmp_path / "none" / "x"):
        pass


@pytest.mark.parametrize(
    "text", ["127.0.0.1:9765", "[::1]:9765", "0.0.0.0:1", "unix:/run/ipsecgate/metrics.sock"]
)
def test_an_address_is_read_and_written(text: str) -> None:
    assert str(Listen.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9765",
        ":9765",
        "localhost:9765",
        "127.0.0.1",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "::1:9765",
        "[127.0.0.1]:9765",
        "1.2.3:9765",
        "unix:metrics.sock",
        "unix:",
        f"unix:/{'x' * PATH_LIMIT}",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Listen.parse(text)
