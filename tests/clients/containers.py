"""Containers without an image: busybox in a folder, run by crun, runc or podman.

They share the network namespace of the host that starts them, unless podman makes one. Their cgroup
is below the given one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipsecgate.edges.host import cgroups

BUSYBOX = Path("/bin/busybox")
FOLDERS = ("bin", "dev", "etc", "proc", "run", "sys", "tmp", "var")


class Containers:
    """The command lines that run commands in containers; `folder` must be empty."""

    def __init__(self, folder: Path, cgroup: Path) -> None:
        self._folder = folder
        self._cgroup = f"/{cgroup.relative_to(cgroups.root())}"
        self.root = folder / "root"
        for name in FOLDERS:
            (self.root / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, self.root / "bin/busybox")

    def oci(
        self, runtime: str, name: str, command: Sequence[str], seccomp: dict[str, Any] | None
    ) -> list[str]:
        """Return the argv that runs a command in a bare OCI runtime; `seccomp`: its profile."""
        bundle = self._folder / name
        bundle.mkdir()
        linux: dict[str, Any] = {
            "cgroupsPath": f"{self._cgroup}/{name}",
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
        }
        if seccomp is not None:
            linux["seccomp"] = seccomp
        process = {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": list(command)}
        configuration = {
            "ociVersion": "1.0.2",
            "process": process,
            "root": {"path": str(self.root), "readonly": True},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": linux,
        }
        (bundle / "config.json").write_text(json.dumps(configuration))
        state = str(self._folder / f"{runtime}-state")
        return [runtime, "--root", state, "run", "--bundle", str(bundle), name]

    def podman(
        self,
        runtime: str,
        name: str,
        command: Sequence[str],
        seccomp: dict[str, Any] | None,
        network: str = "host",
    ) -> list[str]:
        """Return the argv that runs a command in podman with this runtime.

        `network`: "host", or "podman", which is podman's default.
        """
        security = "seccomp=unconfined"
        if seccomp is not None:
            profile = self._folder / f"{name}.json"
            profile.write_text(json.dumps(seccomp))
            security = f"seccomp={profile}"
        places = {
            "root": self._folder / "podman/root",
            "runroot": self._folder / "podman/runroot",
            "tmpdir": self._folder / "podman/tmp",
        }
        return [
            "podman",
            *(f"--{option}={path}" for option, path in places.items()),
            *f"--runtime={runtime} --cgroup-manager=cgroupfs --storage-driver=vfs".split(),
            *f"--events-backend=none run --rm --name={name} --network={network}".split(),
            "--log-driver=k8s-file",  # the default needs a journal if process 1 is systemd
            *f"--cgroupns=host --cgroup-parent={self._cgroup}".split(),
            *f"--security-opt={security} --rootfs {self.root}".split(),
            *command,
        ]
