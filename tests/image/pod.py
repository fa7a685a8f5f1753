"""Containers of the image, run by podman as the DaemonSet describes them.

Capabilities, mounts, the read-only root and the rest are read from packaging/kubernetes, so what
runs here is what a cluster is told to run. Only paths on the node can be replaced.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "packaging/kubernetes"
ARCHIVE = ROOT / ".cache/image/ipsecgate-image.tar"
STORAGE = Path("/run/image")
NODE = {"config": "/etc/ipsecgate", "node-taint": str(KUBERNETES)}
"""Where the ConfigMaps are in these tests, by volume."""
PROFILE = Path("/usr/share/containers/seccomp.json")


def documents() -> list[dict[str, Any]]:
    """Return the resources of packaging/kubernetes, in the order of the kustomization."""
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    texts = [(KUBERNETES / name).read_text() for name in listed]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def pod() -> dict[str, Any]:
    """Return the pod's specification."""
    (found,) = [document for document in documents() if document["kind"] == "DaemonSet"]
    spec: dict[str, Any] = found["spec"]["template"]["spec"]
    return spec


def launch(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output."""
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@dataclass
class Pod:
    """podman with storage of its own. `runtime`: runc, because crun 1.8 needs CAP_SYS_RESOURCE.

    `launch` runs a command and captures its output. `paths`: instead of those on the node.
    """

    image: str = ""
    paths: Mapping[str, Path] = field(default_factory=dict)
    launch: Callable[[list[str]], subprocess.CompletedProcess[str]] = launch
    runtime: str = "runc"

    def load(self) -> None:
        """Load the archive that `make image` leaves."""
        loaded = self.run("load", "--quiet", "--input", str(ARCHIVE)).stdout
        self.image = loaded.partition("Loaded image: ")[2].strip()
        assert self.image.startswith("localhost/ipsecgate:")

    def podman(self, *words: str) -> list[str]:
        places = [f"--{name}={STORAGE}/{name}" for name in ("root", "runroot", "tmpdir")]
        fixed = ("--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--events-backend=none")
        return ["podman", *places, *fixed, f"--runtime={self.runtime}", *words]

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = self.launch(self.podman(*words))
        assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
        return done

    def options(self, name: str, without: str = "") -> list[str]:
        """Return the options for a container of the pod; `without`: a capability to leave out."""
        spec = pod()
        every = [*spec["initContainers"], *spec["containers"]]
        (one,) = [container for container in every if container["name"] == name]
        security = one["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"]["drop"] == ["ALL"]
        assert spec["hostNetwork"]
        assert spec["hostPID"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        added = [cap for cap in security["capabilities"].get("add", ()) if cap != without]
        # A machine without CAP_SYS_RESOURCE can't have podman's usual limits.
        limits = ["--ulimit=nofile=16384:16384", "--ulimit=nproc=4096:4096", "--pids-limit=-1"]
        return [
            *("--network=host", "--pid=host", "--cgroupns=private", "--cgroup-parent=/gate"),
            *("--read-only", "--read-only-tmpfs=false", "--log-driver=k8s-file"),
            *("--security-opt=no-new-privileges", "--cap-drop=ALL"),
            f"--security-opt=seccomp={_runtime_default()}",
            *(f"--cap-add={cap}" for cap in added),
            *(f"--volume={self._mount(spec, mount)}" for mount in one["volumeMounts"]
              if mount["name"] in self.paths or mount["name"] not in ("tmp", "token")),
            "--tmpfs=/tmp",
            *limits,
        ]  # fmt: skip

    def _mount(self, spec: Mapping[str, Any], mount: Mapping[str, Any]) -> str:
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == mount["name"]]
        source = self.paths.get(volume["name"]) or (
            volume["hostPath"]["path"] if "hostPath" in volume else NODE[volume["name"]]
        )
        if volume.get("hostPath", {}).get("type") == "DirectoryOrCreate":
            Path(source).mkdir(mode=0o755, parents=True, exist_ok=True)  # as the kubelet does
        return f"{source}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}"

    def once(
        self, name: str, words: Sequence[str] = (), without: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a container of the pod to its end, with `words` instead of its arguments."""
        spec = pod()
        every = [*spec["initContainers"], *spec["containers"]]
        args = words or next(one["args"] for one in every if one["name"] == name)
        return self.run("run", "--rm", *self.options(name, without), self.image, *args, check=check)

    def start(self, name: str, **variables: str) -> None:
        """Start a container of the pod, with variables of its environment."""
        (one,) = [container for container in pod()["containers"] if container["name"] == name]
        options = [
            *self.options(name),
            *(f"--env={key}={value}" for key, value in variables.items()),
        ]
        program, *words = one.get("command") or ["/usr/bin/ipsecgate", *one["args"]]
        self.run(
            *("run", "--detach", "--name", name, "--entrypoint", program),
            *(*options, self.image, *words),
        )

    def probe(self, kind: str) -> subprocess.CompletedProcess[str]:
        """Run a probe of the controller as the kubelet does."""
        controller = pod()["containers"][0]
        return self.run("exec", "controller", *controller[kind]["exec"]["command"], check=False)

    def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("exec", "controller", "ipsecgate", *words, check=check)

    def stop(self, name: str) -> None:
        """Stop and remove a container, if there is one."""
        self.run("rm", "--force", "--ignore", "--time=5", name)


def _runtime_default() -> Path:
    """Return podman's default profile, with bpf() for CAP_BPF as in containerd from 1.7 on.

    Debian 12's allows it with CAP_SYS_ADMIN only.
    """
    profile = json.loads(PROFILE.read_text())
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name != "bpf"]
    profile["syscalls"].append(
        {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_BPF"]}}
    )
    STORAGE.mkdir(parents=True, exist_ok=True)
    file = STORAGE / "seccomp.json"
    file.write_text(json.dumps(profile))
    return file
