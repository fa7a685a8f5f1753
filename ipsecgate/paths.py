"""Where an instance keeps what: all of it relocatable by option or environment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ipsecgate.errors import UsageError

DEFAULT_CONFIG = Path("/etc/ipsecgate/ipsecgate.toml")
DEFAULT_INSTANCE = "default"


@dataclass(frozen=True, slots=True)
class Paths:
    """One instance's places. Raises: UsageError for an instance name bpffs cannot hold."""

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
        """The run folder; the default instance's is the top one."""
        return self.run if self.instance == DEFAULT_INSTANCE else self.run / self.instance

    @property
    def control(self) -> Path:
        """The controller's socket, root only."""
        return self.run_instance / "control.sock"

    @property
    def seccomp(self) -> Path:
        """The socket at which container runtimes leave their listeners, root only."""
        return self.run_instance / "seccomp.sock"

    @property
    def holds(self) -> Path:
        """The system calls that wait, for a successor of the controller."""
        return self.run_instance / "holds"

    @property
    def lock(self) -> Path:
        """Held by whoever changes pins, for as long as it does."""
        return self.run_instance / "lock"

    @property
    def remembered(self) -> Path:
        """What IKE told must be protected, for a start without IKE."""
        return self.cache / f"{self.instance}.children.json"

    @property
    def targets(self) -> Path:
        """Which cgroups were to be gated last, for a boot with a broken configuration."""
        return self.cache / f"{self.instance}.cgroups.json"
