"""What a candidate configuration would change, compared with what is configured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.admin import change
from ipsecgate.admin.documents import DOCUMENTS
from ipsecgate.admin.policy_document import policy_document, policy_of
from ipsecgate.core.model.flow import TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, Mode
from ipsecgate.core.model.policy import Policy, derived_policies
from ipsecgate.edges.host import cgroups, config, saved_state
from ipsecgate.paths import Paths
from tests.schemas import wrong
from tests.unit.test_difference import policy

GATE = '[gate]\ncgroups = ["{root}/web"]\n{more}'
DB = '[[policy]]\nname = "db"\nremote = ["10.2.0.0/16"]\n'
WEB = '[[policy]]\nname = "web"\nremote = ["10.3.0.0/16"]\nprotocol = "tcp"\nport = "80-89"\n'

Compare = Callable[..., Any]


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Compare two texts of a configuration; cgroups are folders below tmp_path."""
    root = tmp_path / "cgroup"
    (root / "web/inside").mkdir(parents=True)
    for folder in (root, root / "web", root / "web/inside"):
        (folder / "cgroup.procs").touch()
    monkeypatch.setattr(cgroups, "root", lambda: root)
    paths = Paths(tmp_path / "ipsecgate.toml", "test", tmp_path, tmp_path, tmp_path)

    def compare(old: str, new: str, old_gate: str = "", new_gate: str = "", **texts: str) -> Any:
        candidate = tmp_path / "candidate.toml"
        before, after = texts.get("before", GATE), texts.get("after", GATE)
        paths.config.write_text(before.format(root=root, more=old_gate) + old)
        candidate.write_text(after.format(root=root, more=new_gate) + new)
        document = change.compare(
            paths, candidate, config.load(candidate), lambda: config.load(paths.config)
        )
        assert wrong(document, DOCUMENTS["difference"]) == []
        assert document["compared_with"] == "configured"
        return document

    return compare


def test_nothing_changes(compare: Compare) -> None:
    document = compare(DB + WEB, WEB + DB)
    assert (document["opens"], document["closes"]) == (False, False)
    assert document["policies"] == document["settings"] == document["touched"] == []


def test_a_policy_that_is_missing_opens(compare: Compare) -> None:
    document = compare(DB + WEB, DB)
    assert (document["opens"], document["closes"]) == (True, False)
    (found,) = document["policies"]
    assert found == {
        "kind": "opens", "remote": ["10.3.0.0/16"], "protocol": "tcp", "port": "80-89",
        "local_port": "any", "before": "protect", "after": "allow", "old_policy": "web",
        "new_policy": None,
    }  # fmt: skip


def test_a_candidate_that_protects_nothing_has_the_derived_policies(
    compare: Compare, tmp_path: Path
) -> None:
    """And if none are known, everything is refused, as by a gate that knows no policy."""
    bypass = '[[policy]]\nname = "printer"\nremote = ["10.9.9.9/32"]\naction = "bypass"\n'
    document = compare(DB, bypass)
    assert document["closes"]
    assert not document["opens"], "10.2.0.0/16 is protected still"
    remote = policy("x", "10.4.0.0/16").remote[0]
    child = ChildConfig(ChildName("net", "net"), Mode.TUNNEL, (), (TrafficSelector(remote),))
    saved_state.save_children(tmp_path / "test.children.json", (child,))
    document = compare(DB, bypass)
    kinds = {one["kind"]: one for one in document["policies"]}
    assert kinds["opens"]["remote"] == ["10.2.0.0/16"]
    assert (kinds["closes"]["remote"], kinds["closes"]["after"]) == (
        ["10.4.0.0/16"], "protect-or-pass",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "key", "kind"),
    [
        ('mode = "enforce"', 'mode = "audit"', "gate.mode", "opens"),
        ('mode = "audit"', "", "gate.mode", "closes"),
        ('floor = "xfrm-block"', "", "gate.floor", "opens"),
        ("", 'floor = "xfrm-block"', "gate.floor", "closes"),
        ("", 'live_flows = "destroy"', "gate.live_flows", "changes"),
        ("", 'vici = "/run/other"', "gate.vici", "restart"),
        ("", '[errno]\nfailed = "EPERM"', "errno.failed", "changes"),
    ],
)
def test_settings(compare: Compare, before: str, after: str, key: str, kind: str) -> None:
    document = compare(DB, DB, f"{before}\n", f"{after}\n")
    (found,) = document["settings"]
    assert (found["key"], found["kind"]) == (key, kind)
    assert found["text"]
    assert (document["opens"], document["closes"]) == (kind == "opens", kind == "closes")


def test_the_default(compare: Compare) -> None:
    document = compare(DB, DB, "", 'default = "deny"\n')
    assert (document["opens"], document["closes"]) == (False, True)
    assert {(one["before"], one["after"]) for one in document["policies"]} == {("allow", "refuse")}
    everything = {network for one in document["policies"] for network in one["remote"]}
    assert "::/0" in everything


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        ('cgroups = ["{root}/web"]', 'cgroups = ["{root}/web/inside"]', {"opens"}),
        ('cgroups = ["{root}/web/inside"]', 'cgroups = ["{root}/web"]', {"closes"}),
        ('cgroups = ["{root}/web"]', "host = true", {"closes"}),
        ("host = true", 'cgroups = ["unit:web"]', {"opens"}),
        ('cgroups = ["{root}/new"]', 'cgroups = ["{root}/web"]', {"opens", "closes"}),
        ('cgroups = ["{root}/web/new"]', 'cgroups = ["{root}/web"]', {"closes"}),
        ('cgroups = ["unit:web"]', "", {"opens"}),
    ],
)
def test_cgroups(compare: Compare, before: str, after: str, kinds: set[str]) -> None:
    none = 'floor = "none"\n'
    document = compare(
        DB, DB, before=f"[gate]\n{before}\n{none}{{more}}", after=f"[gate]\n{after}\n{none}{{more}}"
    )
    found = [one for one in document["settings"] if one["key"] == "gate.cgroups"]
    assert {one["kind"] for one in found} == kinds
    assert {one["kind"] for one in document["settings"]} == kinds


def test_a_policy_survives_its_document() -> None:
    one = policy(
        "db", "10.2.0.0/16", "2001:db8::/32", proto=6, ports=(80, 89), child="net", start=True
    )
    two = policy("none", "10.0.0.0/8", proto=47, local_ports=(1024, 2047), derived=True)
    child = ChildConfig(
        ChildName("net", "net"),
        Mode.TUNNEL,
        (TrafficSelector(one.remote[0], 17, (53, 53)),),
        (TrafficSelector(two.remote[0], 17),),
    )
    policies: tuple[Policy, ...] = (one, two, *derived_policies((child,)))
    for each in policies:
        assert policy_of(policy_document(each)) == each
    assert policy_document(policies[2])["source"] == "connection net/net"


def test_a_cgroup_inside_one_that_stays_gated_is_not_opened(compare: Compare) -> None:
    inside = 'cgroups = ["{root}/web/inside"]'
    document = compare(
        DB,
        DB,
        before='[gate]\ncgroups = ["{root}/web"]\n{more}',
        after=f"[gate]\n{inside}\n{{more}}",
    )
    web = cgroups.root() / "web"
    is_ungated = change._ungated(document["settings"], (str(web / "inside"),))
    assert is_ungated(web)
    assert is_ungated(web / "other")
    assert not is_ungated(web / "inside")
    assert not is_ungated(web / "inside/deeper")
    assert not is_ungated(cgroups.root() / "elsewhere")
