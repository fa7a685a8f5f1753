"""Download Debian packages with apt, from this machine's suite or from another one.

Rules of this module: the machine's own apt sources, lists and keys are never changed. Another
suite gets package lists of its own and comes from the mirror that the machine already uses.
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
from ipsecgate.lab.kernel import run_tool

KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITE = re.compile(r"[a-z]+(-[a-z]+)*")
UPDATE = "run apt-get update, then try again"


@dataclass(frozen=True, slots=True)
class Archive:
    """A Debian suite as apt sees it. `configuration`: an apt.conf(5), None for the machine's."""

    configuration: Path | None = None

    @classmethod
    @contextmanager
    def for_suite(cls, suite: str | None) -> Iterator[Self]:
        """Yield the archive of `suite`, with temporary package lists; None: the machine's own.

        Raises: GateError if there is no such suite.
        """
        if suite is None:
            yield cls()
            return
        if not SUITE.fullmatch(suite):
            raise GateError(f"not a Debian suite: {suite}", hint="for example: trixie-backports")
        with tempfile.TemporaryDirectory(prefix="ipsecgate-apt-") as folder:
            archive = cls(_configured(Path(folder), suite, mirror()))
            hint = f"is there a {suite} on the mirror that /etc/apt names?"
            archive._apt(["apt-get", "update", "--quiet", "--error-on=any"], Path(folder), hint)
            yield archive

    def depends(self, package: str) -> list[str]:
        """Return the names of the packages that a package depends on, without alternatives."""
        output = self._apt(["apt-cache", "depends", "--important", package], Path("/"), UPDATE)
        return re.findall(r"^ *Depends: ([^<\s]+)$", output, re.MULTILINE)

    def download(self, packages: Sequence[str], into: Path) -> None:
        """Download the .deb files of packages into a folder."""
        self._apt(["apt-get", "download", "--quiet", *packages], into, UPDATE)

    def _apt(self, argv: Sequence[str], cwd: Path, hint: str) -> str:
        own = [] if self.configuration is None else ["env", f"APT_CONFIG={self.configuration}"]
        return run_tool([*own, *argv], cwd, hint)


def mirror() -> str:
    """Return the URL of the Debian mirror that this machine uses."""
    form = "$(ORIGIN) $(LABEL) $(REPO_URI)"
    output = run_tool(["apt-get", "indextargets", "--format", form], Path("/"), UPDATE)
    found = re.search(r"^Debian Debian (\S+)$", output, re.MULTILINE)
    if found is None:
        hint = "add one to /etc/apt, then run apt-get update"
        raise GateError("apt has no Debian mirror", hint=hint)
    return found[1]


def _configured(folder: Path, suite: str, mirror: str) -> Path:
    """Write an apt.conf that knows only one suite, and return its path."""
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
