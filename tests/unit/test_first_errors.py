"""The errors that a user meets before there is any IPsec: not root, and no cgroup2.

The command runs as another user, or where no cgroup2 is mounted. Those of IKE and ESP are in
tests/system/test_first_errors.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="missing: root")
WITHOUT_CGROUP2 = ["unshare", "--mount", "sh", "-c", 'umount --all --types cgroup2; exec "$@"', "-"]
# The capability is for a checkout below a folder that only root may enter.
READS = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *READS]


def run(folder: Path, launcher: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    places = ["--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache")]
    program = [sys.executable, "-B", "-P", "-m", "ipsecgate", "-i", "first-errors", *places]
    return subprocess.run(
        [*launcher, *program, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "300"},
    )  # fmt: skip


@needs_root
@pytest.mark.parametrize(
    "words",
    [
        "status",
        "load",
        "run",
        "attach unit:web",
        "events",
        "why 10.0.0.1:80",
        "exec true",
        "reload",
    ],
)
def test_another_user_is_told_to_be_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    private = tmp_path / "bpf"  # systemd mounts bpffs like that
    private.mkdir(mode=0o700)
    monkeypatch.setenv("IPSECGATE_BPFFS", str(private))
    done = run(tmp_path, AS_NOBODY, *words.split())
    verb = words.split(maxsplit=1)[0]
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"{verb} needs root, and runs as user id {NOBODY}" in done.stderr
    assert f"sudo ipsecgate {verb}" in done.stderr
    assert run(tmp_path, AS_NOBODY, verb, "--help").returncode == 0, "its help is for everybody"


@needs_root
def test_check_says_only_what_it_can_know_as_another_user(tmp_path: Path) -> None:
    done = run(tmp_path, AS_NOBODY, "--json", "check")
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert found["root"]["state"] == "missing"
    assert found["root"]["hint"] == "run it as root"
    assert not found.keys() & {"hooks", "strongswan", "cgroups", "units"}
    assert done.returncode != 0


@needs_root
@pytest.mark.parametrize("words", ["load", "run", "attach unit:web", "exec true"])
def test_without_cgroup2_the_mend_is_named(tmp_path: Path, words: str) -> None:
    done = run(tmp_path, WITHOUT_CGROUP2, *words.split())
    assert done.returncode == 4
    assert "no cgroup2 hierarchy is mounted" in done.stderr
    assert "mount -t cgroup2" in done.stderr


@needs_root
def test_check_reports_a_missing_cgroup2_once(tmp_path: Path) -> None:
    done = run(tmp_path, WITHOUT_CGROUP2, "--json", "check")
    lacking = [f["name"] for f in json.loads(done.stdout) if "cgroup2" in f["found"]]
    assert lacking == ["cgroup2"]
    assert done.returncode == 4
