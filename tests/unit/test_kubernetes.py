"""The manifests of packaging/kubernetes: valid for the API, strict, in step with the program."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ipsecgate.edges.host import config
from tests.image.api_server import OTHER, ApiServer, account, serving
from tests.image.pod import KUBERNETES, ROOT, documents, pod

VERSIONS = ("1.30", "1.32", "1.35")  # 1.30 has the admission policy's API
UNIT = (ROOT / "packaging/systemd/ipsecgate.service").read_text()

_spec = spec_from_file_location("node_taint", KUBERNETES / "node_taint.py")
assert _spec
assert _spec.loader
node_taint = module_from_spec(_spec)
_spec.loader.exec_module(node_taint)
KEY = node_taint.TAINT["key"]


def kinds(kind: str) -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] == kind]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", documents(), ids=lambda one: one["kind"])
def test_the_api_accepts_each_resource(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_the_api_would_refuse_a_wrong_key() -> None:
    (wrong,) = kinds("DaemonSet")
    wrong["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_the_kustomization_has_every_file() -> None:
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    generated = [name for one in listed["configMapGenerator"] for name in one["files"]]
    here = {path.name for path in KUBERNETES.iterdir() if path.is_file()}
    assert here == {"kustomization.yaml", *listed["resources"], *generated}
    maps = {one["configMap"]["name"] for one in pod()["volumes"] if "configMap" in one}
    assert maps == {one["name"] for one in listed["configMapGenerator"]}


def test_nothing_is_privileged() -> None:
    every = [*pod()["initContainers"], *pod()["containers"]]
    for one in every:
        security = one["securityContext"]
        assert "privileged" not in security
        assert security["readOnlyRootFilesystem"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"]["drop"] == ["ALL"]
    assert pod()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod()["automountServiceAccountToken"] is False
    mounted = {
        one["name"] for one in every if any(m["name"] == "token" for m in one["volumeMounts"])
    }
    assert mounted == {"node-taint"}, "the gate itself cannot ask the API"


def test_the_controller_has_the_units_capabilities_but_for_held_calls() -> None:
    line = next(line for line in UNIT.splitlines() if line.startswith("CapabilityBoundingSet="))
    unit = {word.removeprefix("CAP_") for word in line.partition("=")[2].split()}
    added = {one["name"]: one["securityContext"]["capabilities"].get("add", []) for one in
             (*pod()["initContainers"], *pod()["containers"])}  # fmt: skip
    assert set(added["controller"]) == unit - {"SYS_PTRACE"}
    assert set(added["load"]) == {"BPF", "NET_ADMIN", "PERFMON"}
    assert added["node-taint"] == []


def test_arguments_and_probes_are_verbs_of_the_program() -> None:
    controller = pod()["containers"][0]
    probes = [controller[kind]["exec"]["command"] for kind in
              ("startupProbe", "livenessProbe", "readinessProbe")]  # fmt: skip
    taint = ["/usr/bin/ipsecgate", *node_taint.COVERED[1:], "0", "--no-negotiate"]
    for command in [*probes, taint]:
        assert command[0] == "/usr/bin/ipsecgate"
        subprocess.run(
            [str(ROOT / ".venv/bin/ipsecgate"), *command[1:], "--help"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    found = config.load(KUBERNETES / "ipsecgate.toml")
    assert [policy.name for policy in found.settings.policies] == ["db"]
    mounts = {one["mountPath"] for one in pod()["containers"][0]["volumeMounts"]}
    assert str(Path(found.vici).parent) in mounts


# --- the node's taint ------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, [], [OTHER]])
def test_the_taint_comes_and_goes_and_leaves_the_others(
    before: list[dict[str, str]] | None,
) -> None:
    node: dict[str, Any] = {"metadata": {"resourceVersion": "7"}, "spec": {"taints": before}}
    assert node_taint.patch(node, wanted=False) is None
    added = node_taint.patch(node, wanted=True)
    assert added == {
        "metadata": {"resourceVersion": "7"},
        "spec": {"taints": [*(before or []), node_taint.TAINT]},
    }
    node["spec"] = added["spec"]
    assert node_taint.patch(node, wanted=True) is None
    removed = node_taint.patch(node, wanted=False)
    assert removed["spec"] == {"taints": before or []}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with serving(tmp_path) as made:
        yield made


def test_a_node_that_changed_meanwhile_is_read_again(server: ApiServer, tmp_path: Path) -> None:
    node = node_taint.Node("worker", f"https://127.0.0.1:{server.server_port}", tmp_path)
    assert node.set_taint(wanted=True)
    assert server.taints == [OTHER, node_taint.TAINT], "the other change is not lost"
    assert not node.set_taint(wanted=True)
    assert node.set_taint(wanted=False)
    assert server.taints == [OTHER]
    patched = ("PATCH /api/v1/nodes/worker", "Bearer secret", "application/merge-patch+json")
    assert server.seen.count(patched) == 2


def test_a_server_with_another_certificate_gets_no_token(server: ApiServer, tmp_path: Path) -> None:
    other = tmp_path / "other"
    account(other)
    node = node_taint.Node("worker", f"https://127.0.0.1:{server.server_port}", other)
    with pytest.raises(OSError, match="certificate verify failed"):
        node.set_taint(wanted=True)
    assert not server.seen


def test_the_admission_policy_is_about_this_account_and_taint() -> None:
    (policy,) = kinds("ValidatingAdmissionPolicy")
    (account,), (binding,) = kinds("ServiceAccount"), kinds("ValidatingAdmissionPolicyBinding")
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    namespace = kinds("Namespace")[0]["metadata"]["name"]
    (condition,) = policy["spec"]["matchConditions"]
    assert (
        f'"system:serviceaccount:{namespace}:{account["metadata"]["name"]}"'
        in (condition["expression"])
    )
    assert policy["spec"]["variables"][0]["expression"] == f"'{KEY}'"
