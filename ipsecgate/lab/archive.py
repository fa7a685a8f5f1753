"""Debian's archive through apt: as this machine has it, or another suite with lists of its own.

Rules of this module: the machine's own sources, lists and trust stay as they are. The mirror
is the one that they name.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ipsecgate.errors import GateError
from ipsecgate.lab.kernel import call

KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITE = re.compile(r"[a-z]+(-[a-z]+)*")
UPDATE = "run apt-get update, then try again"


@dataclass(frozen=True, slots=True)
class Archive:
    """Packages as apt knows them; `configuration` is its own apt.conf(5), None: the machine's."""

    configuration: Path | None = None

    @classmethod
    @contextmanager
    def of(cls, suite: str | None) -> Iterator[Self]:
        """Look into `suite` with lists that are gone after; None: what the machine looks into.

        Raises: GateError if there is no such suite.
        """
        if suite is None:
            yield cls()
            return
        if not SUITE.fullmatch(suite):
            raise GateError(f"not a suite of Debian: {suite}", hint="for example: trixie-backports")
        with tempfile.TemporaryDirectory(prefix="ipsecgate-apt-") as folder:
            archive = cls(_configured(Path(folder), suite, mirror()))
            hint = f"is there a {suite} on the mirror that /etc/apt names?"
            archive._apt(["apt-get", "update", "--quiet", "--error-on=any"], Path(folder), hint)
            yield archive

    def depends(self, package: str) -> list[str]:
        """Return the names of what a package needs, alternatives left out."""
        said = self._apt(["apt-cache", "depends", "--important", package], Path("/"), UPDATE)
        return re.findall(r"^ *Depends: ([^<\s]+)$", said, re.MULTILINE)

    def download(self, packages: Sequence[str], into: Path) -> None:
        """Put the packages' files into a folder."""
        self._apt(["apt-get", "download", "--quiet", *packages], into, UPDATE)

    def _apt(self, argv: Sequence[str], cwd: Path, hint: str) -> str:
        own = [] if self.configuration is None else ["env", f"APT_CONFIG={self.configuration}"]
        return call([*own, *argv], cwd, hint)


def mirror() -> str:
    """Return the address that the machine has Debian from."""
    form = "$(ORIGIN) $(LABEL) $(REPO_URI)"
    said = call(["apt-get", "indextargets", "--format", form], Path("/"), UPDATE)
    found = re.search(r"^Debian Debian (\S+)$", said, re.MULTILINE)
    if found is None:
        raise GateError("apt has no source of Debian", hint="add one to /etc/apt, apt-get update")
    return found[1]


def _configured(folder: Path, suite: str, mirror: str) -> Path:
    """Write an apt.conf with nothing but one suite, and return its path."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    trust = f"[signed-by={KEYS}] " if KEYS.is_file() else ""
    (folder / "sources.list").write_text(f"deb {trust}{mirror} {suite} main\n")
    configuration = folder / "apt.conf"
    configuration.write_text(
        f'''Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State "{folder}/state";
Dir::State::status "/dev/null";
Dir::Cache "{folder}/cache";
'''
    )
    return configuration
