"""The files and folders of an instance. Options and environment variables can move them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ipsecgate.errors import UsageError

DEFAULT_CONFIG = Path("/etc/ipsecgate/ipsecgate.toml")
DEFAULT_INSTANCE = "default"


@dataclass(frozen=True, slots=True)
class Paths:
    """The paths of one instance. Raises: UsageError for an invalid instance name."""

    config: Path = DEFAULT_CONFIG
    instance: str = DEFAULT_INSTANCE
    bpffs: Path = Path("/sys/fs/bpf")
    run: Path = Path("/run/ipsecgate")
    cache: Path = Path("/var/cache/ipsecgate")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.instance):
            raise UsageError(
                f"invalid instance name {self.instance!r}",
                hint="use at most 64 letters, digits, _ and -",
            )

    @property
    def run_instance(self) -> Path:
        """The folder for sockets and locks; that of the default instance is `run` itself."""
        return self.run if self.instance == DEFAULT_INSTANCE else self.run / self.instance

    @property
    def control(self) -> Path:
        """The socket of the controller, for root only."""
        return self.run_instance / "control.sock"

    @property
    def seccomp(self) -> Path:
        """The socket to which container runtimes send seccomp listeners, for root only."""
        return self.run_instance / "seccomp.sock"

    @property
    def holds(self) -> Path:
        """The folder of the held calls, which the next controller reads."""
        return self.run_instance / "holds"

    @property
    def lock(self) -> Path:
        """The lock file that a process holds while it changes pins."""
        return self.run_instance / "lock"

    @property
    def remembered(self) -> Path:
        """The children that strongSwan had loaded, for a start without strongSwan."""
        return self.cache / f"{self.instance}.children.json"

    @property
    def targets(self) -> Path:
        """The last configured cgroups, for a boot with an invalid configuration."""
        return self.cache / f"{self.instance}.cgroups.json"
