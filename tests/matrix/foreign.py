"""Debian's kernel and programs for another architecture (aarch64), fully emulated.

    python -m tests.matrix.foreign COMMAND...    run one command there, for example
                                                 python3 -m pytest tests/system/test_hold.py

Rules of this module: no program of the foreign root runs on this machine. Debian's packages are
only unpacked (mmdebstrap --variant=extract), and Python packages come as wheels. The kernel boots
under QEMU with that root, and mounts this checkout at the same path.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipsecgate.errors import GateError
from ipsecgate.lab.archive import mirror
from ipsecgate.lab.debian import DebianKernel
from ipsecgate.lab.guest import assignments
from ipsecgate.lab.kernel import Progress, default_cache, locked, run_tool
from ipsecgate.lab.qemu import initrd, shared

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".cache/results/aarch64"
LIMIT = 3600.0  # seconds
INIT = Path(__file__).with_name("foreign-init.sh")
SUITE, ARCHITECTURE, PYTHON = "bookworm", "arm64", "3.11"
NEEDS = {"mmdebstrap": "mmdebstrap", "qemu-system-aarch64": "qemu-system-arm"}
PACKAGES = (
    *("linux-image-arm64", "linux-libc-dev", "busybox-static", "libc-bin", "coreutils", "dash"),
    *("bash", "sed", "grep", "findutils", "python3-bpfcc", "charon-systemd", "nftables"),
    *("strongswan-swanctl", "libcharon-extra-plugins", "iproute2", "kmod", "mount", "procps"),
    *("util-linux", "iputils-ping", "netbase"),
)
WHEELS = ("click", "pyroute2", "rich", "vici", "pytest", "pytest-asyncio", "hypothesis")
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64")
MACHINE = "-machine virt -accel tcg -cpu max,pauth-impdef=on -smp 1 -m 2048"
QUIET = "-nodefaults -no-user-config -no-reboot -display none -serial stdio"
FAST = "mitigations=off kpti=off nokaslr audit=0 apparmor=0 cryptomgr.notests random.trust_cpu=on"
# Files that Debian normally creates when packages are configured.
ACCOUNTS = {
    "passwd": "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
}


@dataclass(frozen=True, slots=True)
class ForeignKernel(DebianKernel):
    """A kernel of another architecture, with its root."""

    root: Path


def fetch(progress: Progress) -> ForeignKernel:
    """Return the kernel and root in the lab's cache; make them if they are missing.

    Raises: GateError.
    """
    for tool, package in NEEDS.items():
        if shutil.which(tool) is None:
            raise GateError(f"{tool} is not installed", hint=f"apt-get install {package}")
    cache = default_cache()
    home = cache / f"root-{SUITE}-{ARCHITECTURE}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f".{home.name}.lock"):
        for leftover in cache.glob(f".{home.name}-*"):
            shutil.rmtree(leftover)
        if not home.is_dir():
            progress(f"unpacking Debian's {SUITE} for {ARCHITECTURE} into {home}")
            _make(Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=cache)), home)
    modules = max((home / "lib/modules").glob("[0-9]*"))
    return ForeignKernel(home / f"boot/vmlinuz-{modules.name}", modules, home / "bin/busybox", home)


def _make(aside: Path, home: Path) -> None:
    again = "fix the error above, then try again"
    aside.chmod(0o755)
    include = f"--include={','.join(PACKAGES)}"
    strap = ["mmdebstrap", "--quiet", "--variant=extract", f"--architectures={ARCHITECTURE}"]
    run_tool([*strap, include, SUITE, str(aside), mirror()], ROOT, again)
    for name, text in ACCOUNTS.items():
        (aside / "etc" / name).write_text(text)
    wheels = ["--target", str(aside / "site"), "--python-version", PYTHON, "--only-binary=:all:"]
    wheels += [f"--platform={name}" for name in PLATFORMS]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
    run_tool([*pip, *wheels, *WHEELS], ROOT, again)
    version = importlib.metadata.version("ipsecgate")  # the checkout has no metadata of its own
    metadata = aside / f"site/ipsecgate-{version}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: ipsecgate\nVersion: {version}\n")
    release = max((aside / "lib/modules").glob("[0-9]*")).name
    run_tool(["depmod", "--basedir", str(aside), release], ROOT, "apt-get install kmod")
    aside.rename(home)


def run(
    kernel: ForeignKernel,
    command: Sequence[str],
    environment: dict[str, str],
    results: Path,
    timeout: float,
    say: Callable[[str], object],
) -> int:
    """Run a command in the guest, in this checkout, and return its exit code.

    `results` is the only folder that the guest can write to. Raises: GateError.
    """
    with tempfile.TemporaryDirectory(prefix="ipsecgate-foreign-") as folder:
        work = Path(folder)
        (work / "initrd").write_bytes(initrd(kernel))
        (work / "init").write_bytes(INIT.read_bytes())
        settings = {"repository": str(ROOT), "results": str(results)}
        (work / "settings").write_text(assignments(settings))
        variables = {
            **environment,
            "PYTHONPATH": f"/site:{ROOT}",
            "IPSECGATE_RESULTS": str(results),
        }
        words = ["exec", "env", *(f"{name}={value}" for name, value in variables.items()), *command]
        (work / "command").write_text(f"cd {shlex.quote(str(ROOT))}\n{shlex.join(words)}\n")
        try:
            console = subprocess.run(
                ["setpriv", "--pdeathsig", "KILL", *_command_line(kernel, work, results)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            ).stdout
        except subprocess.TimeoutExpired as error:
            raise GateError(f"the guest was killed after {timeout:g} s") from error
        finally:
            if (work / "output").exists():
                say((work / "output").read_text(errors="replace"))
        try:
            return int((work / "exit-code").read_text())
        except (OSError, ValueError) as error:
            say(console[-4000:].decode(errors="replace"))
            raise GateError("the guest stopped before its command ended") from error


def _command_line(kernel: ForeignKernel, work: Path, results: Path) -> list[str]:
    return [
        *f"qemu-system-aarch64 {MACHINE} {QUIET}".split(),
        *("-kernel", str(kernel.binary), "-initrd", str(work / "initrd")),
        *("-append", f"console=ttyAMA0 quiet panic=-1 {FAST}"),
        *shared("root", kernel.root, ",readonly=on"),
        *shared("work", work),
        *shared("repository", ROOT, ",readonly=on"),
        *shared("results", results),
    ]


def main() -> int:
    """Run the command line's command, and return its exit code."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    try:
        return run(fetch(print), sys.argv[1:], {}, RESULTS, LIMIT, print)
    except GateError as error:
        raise SystemExit(f"{error}\n{error.hint}".rstrip()) from error


if __name__ == "__main__":
    sys.exit(main())
