"""The screens fit 80 columns and use 140, and show every value as a whole."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console, RenderableType

from ipsecgate.admin.documents import Cgroups, Difference, Flows
from ipsecgate.admin.status_document import Policy, Status
from ipsecgate.cli import change_screen, noun_screens, status_screen
from ipsecgate.cli.tables import ROWS

NOW = time.time()
NETWORKS = ["10.2.0.0/16", "2001:db8:1234:5678::/64", "192.0.2.128/25", "198.51.100.0/24"]


def policy(number: int, **more: Any) -> Policy:
    made: Policy = {
        "name": f"database-{number}",
        "action": "protect",
        "remote": NETWORKS,
        "protocol": "tcp",
        "port": "5432-5440",
        "local_port": "any",
        "child": "frankfurt-to-dublin",
        "initiate": "on-demand",
        "derived": False,
        "source": "/etc/ipsecgate/policies.d/databases.toml:12",
        "coverage": "back-off",
        "last_error": "the peer rejected our identity or PSK (AUTHENTICATION_FAILED)",
        "advice": "compare secret and ids with the peer's, then `swanctl --load-creds`",
        "failed_at": NOW - 40,
        "uncovered": [],
        "children": ["net/frankfurt-to-dublin"],
    }
    return {**made, **more}  # type: ignore[typeddict-item]


def refusal(number: int) -> Any:
    return {
        "flow": f"tcp [2001:db8:1234:5678::{number}]:5432",
        "source": None,
        "reason": "refuse_uncovered",
        "text": "no live SA protects it",
        "cause": "",
        "advice": "",
        "failed_at": None,
        "child": None,
        "policy": "database-1",
        "last": NOW - 12,
        "state": "refuse_uncovered",
    }


STATUS: Status = {
    "instance": "default",
    "mode": "enforce",
    "default": "allow",
    "sa_source": "xfrm",
    "published": True,
    "controller": {"alive": True, "ready": True, "pid": 4711, "since": NOW - 7200},
    "healthy": False,
    "problems": [
        {"text": "IKE daemon: /run/charon.vici: No such file or directory",
         "advice": "start strongSwan: `systemctl start strongswan`"},
    ],
    "warnings": [],
    "errors": [{"text": "IKE daemon: no such file", "advice": "start strongSwan"}],
    "hooks": [
        {"cgroup": f"/sys/fs/cgroup/system.slice/{name}.service", "cgroup_id": number, "hook": hook,
         "attached": True, "prog_id": 9}
        for number, name in enumerate(("postgresql", "web", "kubelet"))
        for hook in ("connect4", "egress")
    ],
    "policies": [policy(1), policy(2, coverage="covered", last_error=""),
                 policy(3, action="bypass", coverage=None, child=None, last_error="")],
    "refused": [refusal(number) for number in range(9)],
    "counters": {
        "allowed": 12345, "refused": 67, "audited": 0, "leaked_blocked": 3, "leaked_audited": 0,
        "events_lost": 0, "held": 4,
        "reasons": {"allow_covered": 12345, "refuse_uncovered": 67, "block_clear": 3},
    },
    "hook_tables": {"policy_masks": 2, "policy_entries": 4, "spd_masks": 1, "spd_entries": 1,
                    "memory": 4 << 20},
    "drift": {"kernel": 0, "maps": 0},
    "negotiations": [
        {"child": "net/frankfurt-to-dublin", "state": "back-off", "attempts": 7,
         "last_error": "the peer rejected our identity or PSK (AUTHENTICATION_FAILED)",
         "advice": "compare secret and ids with the peer's, then `swanctl --load-creds`",
         "failed_at": NOW - 40, "flow": "tcp 10.2.0.9:5432", "policy": "database-1"},
    ],
    "sas": [
        {"spi": "c0ffee00", "protocol": "esp", "reqid": 16384, "peer": "2001:db8:1234:5678::1",
         "child": "net/frankfurt-to-dublin", "since": NOW - 100, "until": NOW + 3600},
    ],
    "holds": [
        {"pid": 1234567, "comm": "postgres-walrecv", "flow": "tcp [2001:db8:1234:5678::9]:5432",
         "daddr": "2001:db8:1234:5678::9", "proto": 6, "dport": 5432, "since": NOW - 3,
         "limit": 30.0, "child": "net/frankfurt-to-dublin", "policy": "database-1"},
    ],
    "namespaces": [],
    "time_to_covered": [],
    "negotiated": [],
    "refused_by_policy": [],
    "refused_by_cgroup": [],
}  # fmt: skip
CGROUPS: Cgroups = {
    "controller": STATUS["controller"],
    "cgroups": [
        {"cgroup": "/sys/fs/cgroup/system.slice/postgresql.service", "cgroup_id": 42,
         "by": "unit:postgresql", "hooks": ["connect4", "egress"], "missing": ["sendmsg6"],
         "processes": 12, "others": ["connect4: BPF program 77 (cil_sock4_connect)"],
         "warnings": [{"text": "connect4 of postgresql.service: it runs after",
                       "advice": "gate what is above it, too"}]},
        {"cgroup": "", "cgroup_id": 43, "by": "unknown", "hooks": ["connect4"], "missing": [],
         "processes": None, "others": [], "warnings": []},
    ],
    "awaited": [{"target": "container:webshop", "text": "it will be gated when it appears",
                 "advice": ""}],
}  # fmt: skip
FLOWS: Flows = {
    "controller": STATUS["controller"],
    "connections": [
        {"flow": "tcp [2001:db8:1234:5678::9]:5432", "source": "[2001:db8:1234:5678::1]:45678",
         "pid": 4712, "comm": "psql", "policy": "database-1",
         "cgroup": "/sys/fs/cgroup/system.slice/postgresql.service", "state": "allow_covered"},
    ],
    "refused": [refusal(1)],
    "decisions": [
        {"flow": "udp 10.2.0.9:53", "source": "10.1.0.1", "reason": "allow_covered"},
    ],
}  # fmt: skip
DIFFERENCE: Difference = {
    "controller": STATUS["controller"],
    "candidate": "/root/ipsecgate.toml",
    "compared_with": "in force",
    "opens": True,
    "closes": True,
    "policies": [
        {"kind": "opens", "remote": NETWORKS, "protocol": "not tcp, udp", "port": "any",
         "local_port": "1024-2047", "before": "protect", "after": "allow",
         "old_policy": "database-1", "new_policy": None},
        {"kind": "closes", "remote": ["10.9.0.0/16"], "protocol": "tcp", "port": "5432",
         "local_port": "any", "before": "allow", "after": "refuse", "old_policy": None,
         "new_policy": "database-2"},
    ],
    "settings": [
        {"kind": "opens", "key": "gate.cgroups", "before": "unit:postgresql", "after": "",
         "text": "it is no longer gated"},
    ],
    "touched": [
        {"what": "connection", "name": "tcp [2001:db8:1234:5678::9]:5432",
         "where": "/sys/fs/cgroup/system.slice/postgresql.service", "kind": "opens"},
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)


def drawn(made: RenderableType, width: int) -> str:
    console = Console(
        file=io.StringIO(),
        width=width,
        highlight=False,
        markup=False,
        emoji=False,
        color_system=None,
    )
    console.print(made)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def screens(width: int, **more: Any) -> dict[str, str]:
    everything = more or {"everything": True}
    status: Any = STATUS
    return {
        "status": drawn(status_screen.screen(STATUS), width),
        "policies": drawn(noun_screens.policies(status, width, **everything), width),
        "sas": drawn(noun_screens.sas(status, width, **everything), width),
        "holds": drawn(noun_screens.holds(status, width, **everything), width),
        "cgroups": drawn(noun_screens.cgroups(CGROUPS, width, **everything), width),
        "flows": drawn(noun_screens.flows(FLOWS, width, **everything), width),
        "difference": drawn(change_screen.screen(DIFFERENCE, **everything), width),
    }


# Per screen, what must be there: each cell is looked for without its line breaks.
SHOWN = {
    "status": [
        "1 problem", "No such file or directory", "systemctl start strongswan", "pid 4711",
        "3 cgroups: postgresql.service, web.service, kubelet.service", "1 back-off", "1 covered",
        "1 with 1 peer", "67 refused (no live SA)", "AUTHENTICATION_FAILED", "9 flows, all in",
        "[2001:db8:1234:5678::2]:5432", "ipsecgate why [2001:db8:1234:5678::0]:5432",
    ],
    "policies": [
        "database-1", "databases.toml:12", *NETWORKS, "5432-5440", "back-off",
        "frankfurt-to-dublin", "AUTHENTICATION_FAILED",
    ],
    "sas": ["c0ffee00", "2001:db8:1234:5678::1", "net/frankfurt-to-dublin", "16384", "60 min"],
    "holds": ["postgres-walrecv", "1234567", "[2001:db8:1234:5678::9]:5432",
              "net/frankfurt-to-dublin", "30 s"],
    "cgroups": ["/sys/fs/cgroup/system.slice/postgresql.service", "unit:postgresql", "12",
                "without sendmsg6", "BPF program 77 (cil_sock4_connect)", "removed cgroup 43",
                "container:webshop", "it runs after"],
    "flows": ["[2001:db8:1234:5678::9]:5432", "[2001:db8:1234:5678::1]:45678", "covered",
              "psql (4712)", "refused: no live SA", "udp 10.2.0.9:53"],
    "difference": ["opens and closes", *NETWORKS, "not tcp, udp", "from 1024-2047",
                   "allow, no policy", "database-1", "unit:postgresql", "no longer gated"],
}  # fmt: skip


def columns(text: str) -> str:
    """Return a screen column by column: a cell that goes on in the next line is in one piece."""
    rows = text.splitlines()
    starts = sorted({0, *(m.start() for row in rows for m in re.finditer(r"(?<=  )\S", row))})
    cells = [
        "".join(row[start:end].strip() for row in rows)
        for start in starts
        for end in [*starts, None]
        if end is None or end > start
    ]
    return "\n".join([text, *cells]).replace(" ", "")


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", SHOWN)
def test_a_screen_fits_and_leaves_nothing_out(name: str, width: int) -> None:
    text = screens(width)[name]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    found = columns(text)
    for value in SHOWN[name]:
        assert value.replace(" ", "") in found, f"{value!r} is not in\n{text}"


def test_a_wide_screen_uses_its_width() -> None:
    for name in ("policies", "cgroups", "flows"):
        narrow, wide = screens(80)[name], screens(140)[name]
        assert len(wide.splitlines()) < len(narrow.splitlines()), name
        assert max(map(len, wide.splitlines())) > 80


def test_the_status_is_one_screen() -> None:
    assert len(screens(80)["status"].splitlines()) <= 25
    assert len(screens(140)["status"].splitlines()) <= 24


def test_long_lists_are_folded_and_say_so() -> None:
    many: Any = {**STATUS, "policies": [policy(number) for number in range(ROWS + 3)]}
    text = drawn(noun_screens.policies(many, 80, everything=False), 80)
    assert "and 3 more: --all shows them" in text
    assert f"database-{ROWS}" not in text
    many["policies"] = [policy(1, remote=[f"10.{n}.0.0/16" for n in range(6)])]
    text = drawn(noun_screens.policies(many, 80, everything=False), 80)
    assert "10.2.0.0/16" in text
    assert "and 3 more" in text
    assert "10.5.0.0/16" in drawn(noun_screens.policies(many, 80, everything=True), 80)


def test_each_noun_says_that_no_controller_runs() -> None:
    dead = {"alive": False, "ready": False, "pid": None, "since": None}
    status: Any = {**STATUS, "controller": dead}
    others: dict[str, Any] = {"cgroups": CGROUPS, "flows": FLOWS}
    for name in ("policies", "sas", "holds", "cgroups", "flows"):
        document = {**others.get(name, status), "controller": dead}
        text = drawn(getattr(noun_screens, name)(document, 80, everything=False), 80)
        assert text.startswith("The controller is not running"), name


def changed(document: Any, **fields: Any) -> Any:
    return {**document, **fields}


def test_the_brief_form() -> None:
    lines = drawn(status_screen.brief(STATUS), 200).splitlines()
    assert lines[0].startswith("ipsecgate degraded: IKE daemon")
    assert lines[1].startswith("next: start strongSwan")
    healthy: Any = {**STATUS, "problems": [], "healthy": True}
    (line,) = drawn(status_screen.brief(healthy), 200).splitlines()
    said = "1 of 2 protect policies covered, 1 SA, 1 call held"
    assert line == f"ipsecgate ok, 9 flows refused lately: {said}"
    (line,) = drawn(status_screen.brief(changed(healthy, mode="audit")), 200).splitlines()
    assert line == f"ipsecgate ok, audit mode, 9 flows would be refused: {said}"
    (line,) = drawn(status_screen.brief(changed(healthy, refused=[])), 200).splitlines()
    assert line == f"ipsecgate ok: {said}"


def test_a_partly_covered_policy_names_its_network() -> None:
    missing = ["2001:db8:1234:5678::/64"]
    many: Any = {
        **STATUS,
        "policies": [policy(1, coverage="partly-covered", uncovered=missing, last_error="")],
    }
    text = drawn(status_screen.screen(many), 80)
    assert "1: 1 partly covered" in text
    assert "database-1: no live SA covers 2001:db8:1234:5678::/64" in text
    text = drawn(noun_screens.policies(many, 140, everything=False), 140)
    assert "partly covered" in text
    assert "next: `ipsecgate up database-1`" in text


def test_the_status_says_what_nobody_has_asked_for_and_why_ike_failed() -> None:
    idle = policy(1, coverage="uncovered", children=[], last_error="")
    refused = {**refusal(1), "cause": "the peer did not answer", "child": "net/dublin"}
    many: Any = {**STATUS, "policies": [idle], "refused": [refused]}
    text = drawn(status_screen.screen(many), 140)
    assert "1: 1 not asked for yet" in text
    assert "no live SA: child net/dublin failed" in text


def negotiation(child: str, state: str, seconds: float) -> Any:
    return {"child": f"{child}/{child}", "state": state, "attempts": 2, "failed_at": NOW - seconds,
            "last_error": f"cause of {child}", "advice": f"mend {child}", "flow": "tcp 10.2.0.9:1",
            "policy": "db"}  # fmt: skip


def failures(*negotiations: Any) -> str:
    document: Any = {**STATUS, "problems": [], "refused": [], "negotiations": [*negotiations]}
    return drawn(status_screen.screen(document), 140).partition("Failed negotiations")[2]


def test_each_failure_has_its_age_and_its_next_step_the_last_first() -> None:
    lines = failures(negotiation("a", "back-off", 60), negotiation("b", "negotiating", 3)).split(
        "\n"
    )
    assert [line.rstrip() for line in lines[1:7]] == [
        "connection b, child b: negotiating, 2 attempts, failed 3 s ago",
        "  cause of b",
        "  next: mend b",
        "connection a, child a: back-off, 2 attempts, failed 60 s ago",
        "  cause of a",
        "  next: mend a",
    ]


def test_an_outdated_cause_is_not_beside_a_newer_one() -> None:
    """Nobody tries `old` again, and `new` is another gateway for the same flow."""
    old, new = negotiation("old", "uncovered", 60), negotiation("new", "back-off", 3)
    assert "cause of old" not in failures(old, new)
    assert "cause of old" in failures(old), "nothing newer is known"
    assert "cause of old" in failures({**old, "flow": "tcp 10.2.7.7:1"}, new), "of another flow"
    assert "cause of old" in failures({**old, "state": "back-off"}, new), "both are tried again"
    assert failures(negotiation("old", "uncovered", 3600)) == "", "that was an hour ago"
    assert "cause of old" in failures(negotiation("old", "back-off", 3600))
