"""Root runs the program in a folder and with variables that another user has prepared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STRANGER = 65534
PROGRAMS = ("ip", "mount", "unshare", "python3", "cc", "clang", "uname", "modprobe")
MODULES = ("ipsecgate", "bcc", "json", "struct", "ctypes", "sitecustomize")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """Another user's folder, whose modules and programs leave a line in `ran` when they run."""
    folder = tmp_path / "trap"
    (folder / "kernel").mkdir(parents=True)
    tmp_path.chmod(0o755)
    ran = folder / "ran"
    for name in MODULES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"open('{ran}', 'a').write('{name}\\n')\n")
    for name in PROGRAMS:
        (folder / name).write_text(f'#!/bin/sh\necho {name} >>{ran}\nexec /usr/bin/{name} "$@"\n')
        (folder / name).chmod(0o755)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    return folder


@pytest.mark.parametrize("verb", [["check"], ["load"]])
def test_no_program_or_module_of_another_user_is_run(
    verb: list[str], trap: Path, tmp_path: Path, unique: str
) -> None:
    """The cache is empty, so the hooks are compiled as well."""
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-P", "-m", "ipsecgate", *places, "-i", unique, "--json"]
    environment = {
        "PATH": f".:{trap}:/usr/sbin:/usr/bin:/sbin:/bin",
        "BCC_KERNEL_SOURCE": str(trap / "kernel"),
        "TMPDIR": str(trap),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            cwd=trap,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    try:
        done = run(*verb)
        ran = trap / "ran"
        assert not ran.exists(), ran.read_text()
        if verb == ["check"]:
            found = {finding["name"]: finding["state"] for finding in json.loads(done.stdout)}
            assert found["hooks"] == "ok", done.stdout
        else:
            assert done.returncode == 0, done.stderr
    finally:
        run("unload", "--force")
