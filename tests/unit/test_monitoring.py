"""The shipped dashboard and alerts: they parse, do what they say, and name metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ipsecgate.monitor.metrics import registry
from tests.unit.status_documents import status

ROOT = Path(__file__).parents[2]
RULES = ROOT / "packaging/monitoring/ipsecgate.rules.yml"
DASHBOARD = ROOT / "packaging/monitoring/ipsecgate-dashboard.json"
ALERTS = Path(__file__).with_name("alerts.test.yml")
METRIC = re.compile(r"\bipsecgate_\w+")


def promtool(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def queries() -> list[str]:
    """Return every query of the dashboard, with Grafana's variables replaced."""
    found = [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]
    found += [note["expr"] for note in dashboard()["annotations"]["list"]]
    return [q.replace("$__rate_interval", "5m").replace("$instance", ".*") for q in found]


def names_scraped() -> set[str]:
    families = text_string_to_metric_families(generate_latest(registry(status)).decode())
    return {sample.name for family in families for sample in family.samples}


def test_promtool_accepts_the_alerts() -> None:
    done = promtool("check", "rules", str(RULES))
    assert done.returncode == 0, done.stderr
    assert "15 rules found" in done.stdout


def test_each_alert_fires_for_its_fault_and_not_before() -> None:
    done = promtool("test", "rules", str(ALERTS))
    assert done.returncode == 0, done.stdout + done.stderr
    named = set(re.findall(r'alertname: (\w+)|alertname="(\w+)"', ALERTS.read_text()))
    defined = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    silent = {name for name, _ in named if name}
    firing = {name for _, name in named if name} | {"IpsecgateControllerDown"}
    assert silent == firing == defined


@pytest.mark.parametrize("change", [("== 0", "== 7"), ("> 2", "> 2000"), ("for: 1m", "for: 9h")])
def test_a_spoilt_alert_is_found(tmp_path: Path, change: tuple[str, str]) -> None:
    (tmp_path / "rules.yml").write_text(RULES.read_text().replace(*change))
    text = ALERTS.read_text().replace(f"../../{RULES.relative_to(ROOT)}", "rules.yml")
    (tmp_path / "test.yml").write_text(text)
    assert promtool("test", "rules", str(tmp_path / "test.yml")).returncode != 0


def test_prometheus_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(queries())]
    file = tmp_path / "queries.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = promtool("check", "rules", str(file))
    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout
    assert len(rules) > 25
    assert not [query for query in queries() if "$" in query]


def test_dashboard_and_alerts_name_only_metrics_that_exist() -> None:
    known = names_scraped()
    for text in (RULES.read_text(), *queries()):
        assert set(METRIC.findall(text)) - known == set()
    shown = {name for query in queries() for name in METRIC.findall(query)}
    left = {re.sub("_(bucket|sum|count)$", "", name) for name in known - shown}
    assert left <= {
        "ipsecgate_build_info",
        "ipsecgate_calls_held_total",
        "ipsecgate_default_deny",
        "ipsecgate_policies_published",
        "ipsecgate_policy_blocked_packets_total",
        "ipsecgate_removed_cgroups",
        "ipsecgate_time_to_covered_seconds",
    }, "a new metric has a panel, or is named here"


def test_the_panels_fill_a_grid_without_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    used: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not used & cells, panel["title"]
        used |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'instance=~"$instance"' in target["expr"], panel["title"]
