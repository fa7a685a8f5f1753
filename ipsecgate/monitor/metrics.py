"""The metrics of a gate: its status document as families of metrics for Prometheus.

Rules of this module: a label has few values, which the operator or this code has chosen: names of
policies, reasons, hooks, states. It never has an address, a process or a text from a peer. What
only a controller knows is left out while none runs: a missing series is not mistaken for a zero.

Source: Prometheus, "Writing exporters" and "Metric and label naming".
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import islice

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from ipsecgate.admin.coverage import COVERAGES
from ipsecgate.admin.status_document import Status
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.tables.rule_table import (
    COARSE_ENTRIES,
    COARSE_MASKS,
    ENTRY_LIMIT,
    MASK_LIMIT,
)
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.errors import GateError
from ipsecgate.printable import printable_document

log = logging.getLogger("ipsecgate")

POLICIES = 1000  # with series of their own; those after them are only among the totals

Rows = Iterable[tuple[tuple[str, ...], float]]
"""The values of the labels, and the value, of each series."""


def registry(read: Callable[[], Status]) -> CollectorRegistry:
    """Return a registry that reads the gate anew for each scrape. `read`: see `GateCollector`."""
    found = CollectorRegistry(auto_describe=False)
    found.register(GateCollector(read))
    return found


class GateCollector(Collector):
    """Collects the metrics of one gate.

    `read` returns the status document. It may raise FileNotFoundError, OSError and GateError: then
    the metrics say that nothing could be read, and the log says why, once.
    """

    def __init__(self, read: Callable[[], Status]) -> None:
        self._read = read
        self._lock = threading.Lock()  # two scrapes at once would only make both slower
        self._last_error = ""

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what there is shows only when the gate is read."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        with self._lock:
            began = time.monotonic()
            document = self._document()
            took = time.monotonic() - began
        build = InfoMetricFamily("ipsecgate_build", "The version of the exporter.")
        build.add_metric([], {"version": version("ipsecgate")})
        yield build
        yield _gauge("read_duration_seconds", "How long reading the gate took.", took)
        text = "1 if hooks are loaded and could be read, else 0: nothing is known then."
        yield _gauge("hooks_up", text, document is not None)
        is_up = document is not None and document["controller"]["alive"]
        yield _gauge("controller_up", "1 if a controller answers, else 0.", is_up)
        if document is not None:
            yield from families(printable_document(document))

    def _document(self) -> Status | None:
        try:
            document = self._read()
        except FileNotFoundError:
            error = "the hooks are not loaded: nothing is gated"
        except (OSError, GateError) as cause:
            error = f"cannot read the gate: {cause}"
        else:
            self._last_error = ""
            return document
        if error != self._last_error:
            log.warning("%s", error)
        self._last_error = error
        return None


def families(document: Status) -> Iterator[Metric]:
    """Yield the families of a document whose texts are printable."""
    yield from _gate(document)
    yield from _decisions(document)
    yield from _policies(document)
    yield from _tables(document)
    if document["controller"]["alive"]:
        yield from _controller(document)


def _gate(document: Status) -> Iterator[Metric]:
    yield _gauge(
        "audit_mode", "1 if nothing is refused, only counted.", document["mode"] == "audit"
    )
    text = "1 if flows that no policy names are refused."
    yield _gauge("default_deny", text, document["default"] == "deny")
    text = "1 once policies are in force; 0: all but loopback is refused."
    yield _gauge("policies_published", text, document["published"])
    text = "Errors that `ipsecgate status` shows, such as a refused reload or a missing cgroup."
    yield _gauge("errors", text, len(document["errors"]))
    attached = Counter(hook["hook"] for hook in document["hooks"] if hook["attached"])
    rows = [((hook,), attached[hook]) for hook in HOOKS]
    yield _gauges("hook_attachments", "Gated cgroups, by hook.", ("hook",), rows)
    gone = {hook["cgroup_id"] for hook in document["hooks"] if not hook["attached"]}
    text = "Gated cgroups that were removed; their successors are not gated by these hooks."
    yield _gauge("removed_cgroups", text, len(gone))


def _decisions(document: Status) -> Iterator[Metric]:
    counters = document["counters"]
    requests: list[tuple[tuple[str, ...], float]] = []
    packets: list[tuple[tuple[str, ...], float]] = []
    for name, count in counters["reasons"].items():
        kind, _, reason = name.partition("_")
        if kind == "block":
            packets.append(((reason,), count))
        else:
            result = {"allow": "allowed", "refuse": "refused"}[kind]
            requests.append(((result, reason), count))
    text = "Requests that the hooks decided, since they were loaded; in audit mode none is refused."
    yield _counters("decisions", text, ("result", "reason"), requests)
    text = "Refused requests that audit mode let through."
    yield _counter("audited_decisions", text, counters["audited"])
    text = (
        "Clear packets that the backstop blocked behind the hooks; in audit mode none is blocked."
    )
    yield _counters("blocked_packets", text, ("reason",), packets)
    text = "Blocked packets that audit mode let through."
    yield _counter("audited_packets", text, counters["leaked_audited"])
    text = "Refusals that the controller did not hear of; the hooks refused them all the same."
    yield _counter("events_lost", text, counters["events_lost"])


def _policies(document: Status) -> Iterator[Metric]:
    states = Counter((policy["action"], policy["coverage"]) for policy in document["policies"])
    for name in COVERAGES:
        states.setdefault(("protect", name), 0)
    rows = [((action, coverage or ""), float(n)) for (action, coverage), n in states.items()]
    text = "Policies in force, by action and by the state of their SAs (only those that protect)."
    yield _gauges("policies", text, ("action", "coverage"), sorted(rows))
    states_of = {policy["name"]: policy["coverage"] for policy in document["policies"]}
    covered = [((n,), states_of[n] == Coverage.COVERED.value) for n in _names(document, "protect")]
    text = "1 if live SAs cover each network of a policy that protects, else 0."
    yield _gauges("policy_covered", text, ("policy",), covered)


def _tables(document: Status) -> Iterator[Metric]:
    tables = document["hook_tables"]
    label, names = ("table",), ("policy", "spd")
    entries = [((name,), float(tables[f"{name}_entries"])) for name in names]  # type: ignore[literal-required]
    masks = [((name,), float(tables[f"{name}_masks"])) for name in names]  # type: ignore[literal-required]
    yield _gauges("table_entries", "Entries of a table of the hooks.", label, entries)
    limit = [((name,), float(ENTRY_LIMIT - COARSE_ENTRIES)) for name in names]
    text = "Entries that fit; beyond them more is refused than necessary."
    yield _gauges("table_entries_limit", text, label, limit)
    yield _gauges("table_masks", "Distinct selector shapes (masks) of a table.", label, masks)
    limit = [((name,), float(MASK_LIMIT - COARSE_MASKS)) for name in names]
    text = "Masks that fit; beyond them more is refused than necessary."
    yield _gauges("table_masks_limit", text, label, limit)
    yield _gauge("maps_memory_bytes", "Kernel memory of the hooks' maps.", tables["memory"])


def _controller(document: Status) -> Iterator[Metric]:
    """Yield what only a controller knows. Its counts begin at 0 when it starts."""
    text = "When the controller started, in seconds since the epoch."
    yield _gauge("controller_start_time_seconds", text, document["controller"]["since"] or 0)
    yield _gauge("sas", "Live outbound SAs.", len(document["sas"]))
    text = "Calls that are held now, until an SA protects them."
    yield _gauge("held_calls", text, len(document["holds"]))
    yield _counter("calls_held", "Calls that were held.", document["counters"]["held"])
    states = Counter(item["state"] for item in document["negotiations"])
    text = "Children that flows have asked for, by the state of their SA."
    rows: Rows = [((one.value,), states[one.value]) for one in Coverage]
    yield _gauges("children", text, ("coverage",), rows)
    yield from _by_policy(document)
    drift = document["drift"] or {"kernel": 0, "maps": 0}
    text = (
        "Differences that the minute's comparison found and repaired; not 0: something was missed."
    )
    rows = [(("kernel",), drift["kernel"]), (("maps",), drift["maps"])]
    yield _counters("drift_repaired", text, ("where",), rows)
    yield _time_to_covered(document)


def _by_policy(document: Status) -> Iterator[Metric]:
    """Yield the counts of each policy. They begin with 0, or `increase` would miss the first."""
    names = _names(document, "protect", "discard")
    refused = {one["policy"] or "": one for one in document["refused_by_policy"]}
    known = [*names, ""]
    text = "Requests that a policy refused; those that no policy names have an empty one."
    rows: Rows = [((n,), refused[n]["refused"] if n in refused else 0) for n in known]
    yield _counters("policy_refusals", text, ("policy",), rows)
    text = "Clear packets blocked by a policy; those that no policy names have an empty one."
    rows = [((n,), refused[n]["blocked"] if n in refused else 0) for n in known]
    yield _counters("policy_blocked_packets", text, ("policy",), rows)
    text = (
        "Negotiations that ended, by policy and outcome: established, failed, narrowed (the peer "
        "left the flow out) or aborted (the IKE daemon went)."
    )
    protecting = _names(document, "protect")
    ended = {(name, outcome): 0 for name in protecting for outcome in ("established", "failed")}
    for one in document["negotiated"]:
        if one["policy"] in protecting:
            ended[one["policy"], one["outcome"]] = one["count"]
    yield _counters("negotiations", text, ("policy", "outcome"), ended.items())


def _names(document: Status, *actions: str) -> dict[str, None]:
    """Return the names of the policies that have one of these actions and series of their own."""
    names = (one["name"] for one in document["policies"] if one["action"] in actions)
    return dict.fromkeys(islice(names, POLICIES))


def _time_to_covered(document: Status) -> Metric:
    text = "From the first refusal of a flow until an SA protected it."
    family = HistogramMetricFamily("ipsecgate_time_to_covered_seconds", text, labels=["policy"])
    for item in document["time_to_covered"][:POLICIES]:
        buckets = [(str(float(limit)), count) for limit, count in item["buckets"]]
        family.add_metric([item["policy"]], [*buckets, ("+Inf", item["count"])], item["sum"])
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"ipsecgate_{name}", text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"ipsecgate_{name}", text, value=float(value))


def _gauges(name: str, text: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    return _filled(GaugeMetricFamily(f"ipsecgate_{name}", text, labels=labels), rows)


def _counters(name: str, text: str, labels: tuple[str, ...], rows: Rows) -> Metric:
    return _filled(CounterMetricFamily(f"ipsecgate_{name}", text, labels=labels), rows)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, rows: Rows) -> Metric:
    for labels, value in rows:
        family.add_metric(labels, float(value))
    return family
