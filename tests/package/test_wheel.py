"""Wheel and sdist outside a checkout: pip installs them on a clean Debian without BCC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

DIST = Path(os.environ.get("IPSECGATE_PACKAGE_DIST", ""))
ROOT = Path(os.environ.get("IPSECGATE_PACKAGE_ROOT", ""))
CHECKOUT = Path(__file__).parents[2]
FOLDER = "/mnt"

# Make the root's /mnt and /run empty, show it the files of $2 in /srv, and run the rest in it.
ENTER = """
set -eu
root=$1 files=$2
shift 2
mount -t tmpfs tmpfs "$root/mnt"
mount -t tmpfs tmpfs "$root/run"
mount --bind "$files" "$root/srv"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 "$@"
"""
INSTALL = """
set -eu
python3 -m venv --system-site-packages /mnt/venv
/mnt/venv/bin/pip install --quiet --no-index --find-links=/srv "$1" >&2
cd /
/mnt/venv/bin/ipsecgate --version | head -n 1
/mnt/venv/bin/ipsecgate --json check || true
/mnt/venv/bin/ipsecgate --json load 2>&1 || true  # an error is printed on stderr
"""


def inside(files: Path, *argv: str) -> str:
    """Run a command in the clean root, without a network, and return what it prints."""
    spaces = ["--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--net"]
    words = ["unshare", *spaces, "sh", "-c", ENTER, "sh", str(ROOT), str(files), *argv]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, the sdist, and all that pip needs to install either."""
    folder = tmp_path_factory.mktemp("files")
    for file in DIST.glob("ipsecgate-*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", f"--dest={folder}"]
    for words in (["-c", "constraints.txt", str(wheel)], ["hatchling==1.33.0"]):
        subprocess.run([*pip, *words], check=True, cwd=CHECKOUT)
    return folder


@pytest.mark.parametrize("suffix", ["py3-none-any.whl", "tar.gz"])
def test_pip_installs_it_and_check_says_what_is_missing(files: Path, suffix: str) -> None:
    (file,) = (f for f in files.glob("ipsecgate-*") if f.name.endswith(suffix))
    said = inside(files, "sh", "-c", INSTALL, "sh", f"/srv/{file.name}")
    version, _, documents = said.partition("\n")
    assert version.split()[0].strip(",") == "ipsecgate"
    decoder = json.JSONDecoder()
    check, end = decoder.raw_decode(documents)
    load, _ = decoder.raw_decode(documents[end:].strip())
    findings = {one["name"]: one for one in check}
    assert findings["compiler"]["state"] != "ok"
    assert findings["compiler"]["hint"] == "apt install python3-bpfcc"
    assert findings["strongswan"]["state"] == "missing"
    assert "systemctl start strongswan" in findings["strongswan"]["hint"]
    assert findings["root"]["state"] == "ok"
    assert "BCC is not installed" in load["error"]


def test_the_wheel_has_the_sources_of_the_hooks() -> None:
    (wheel,) = DIST.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for source in (CHECKOUT / "bpf").rglob("*.[ch]"):
        assert f"ipsecgate/_bpf/{source.relative_to(CHECKOUT / 'bpf')}" in names
    assert not [name for name in names if name.startswith(("tests", "bench"))]


def test_the_sdist_is_what_git_has() -> None:
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listing = subprocess.run(
        ["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert names - {"PKG-INFO"} == set(listing.stdout.split())


def test_the_sbom_names_what_pip_installs() -> None:
    (file,) = DIST.glob("*.cdx.json")
    sbom = json.loads(file.read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    found = {one["name"].lower(): one for one in sbom["components"]}
    assert {"click", "rich", "vici"} <= found.keys()
    pinned = (CHECKOUT / "constraints.txt").read_text().lower()
    for name, one in found.items():
        assert name == "ipsecgate" or f"{name}=={one['version']}" in pinned
    licenses = [one["license"].get("id") for one in found["vici"]["licenses"] if "license" in one]
    assert "MIT" in licenses
