"""Debian's own kernel as a guest under QEMU: it has what user-mode-linux lacks, but is slow.

Rules of this module: no hardware virtualisation is needed, and one processor is emulated. The
host's root is shared read-only over 9p, with a tmpfs above it. Only the results folder and the
guest's own folder are writable. This module boots as far as the host's files; qemu-init.sh
continues from there. `guest.run` uses it when its kernel is a `DebianKernel`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ipsecgate.errors import GateError
from ipsecgate.lab.console import OnOutput
from ipsecgate.lab.debian import QEMU, DebianKernel
from ipsecgate.lab.packed import unpack
from ipsecgate.lab.uml import Uml

INIT = Path(__file__).with_name("qemu-init.sh")
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
"""The modules that are needed to mount the host's files."""
TOOLS = ("sh", "insmod", "mkdir", "mount", "switch_root")
CPU = "max,la57=off,pcid=off"
"""Every emulated feature, except two that only cost time."""
FAST = (
    "mitigations=off nokaslr audit=0 apparmor=0 cryptomgr.notests no_timer_check tsc=reliable"
    " random.trust_cpu=on"
)
"""Turns off features that cost seconds of an emulated boot and are not used here."""
SHARE = "trans=virtio,version=9p2000.L,msize=512000"


class Qemu(Uml):
    """A running QEMU with the interface of `Uml`, killed when the `with` block ends.

    `work` must contain `settings`, as `guest.settings_file` writes them, and gets `init` and
    `initrd`. `init` is the script that the first script of the initrd hands over to.
    """

    kind = "QEMU with Linux"
    boot_limit = 300.0
    """Seconds until the command begins: 6 on a quiet machine."""

    def __init__(
        self,
        kernel: DebianKernel,
        work: Path,
        memory: int,
        results: Path,
        on_output: OnOutput,
        *,
        init: Path = INIT,
    ) -> None:
        (work / "init").write_bytes(init.read_bytes())
        (work / "initrd").write_bytes(initrd(kernel))
        words = partial(command_line, kernel, work, memory, results)
        self._start(kernel, work, on_output, words, {})


def command_line(
    kernel: DebianKernel, work: Path, memory: int, results: Path, output: int
) -> list[str]:
    """Return QEMU's command line. `memory`: MiB. `output`: the fd for the guest's ttyS1.

    Source: qemu-system-x86_64(1).
    """
    command = f"{QEMU} -machine pc -accel tcg -cpu {CPU} -smp 1 -m {memory}"
    command += " -nodefaults -no-user-config -no-reboot -display none"
    command += " -serial file:/dev/stdout"
    kernel_line = f"console=ttyS0 panic=-1 {FAST}"
    return [
        *f"{command} -serial file:/dev/fd/{output}".split(),
        *("-kernel", str(kernel.binary), "-initrd", str(work / "initrd"), "-append", kernel_line),
        *shared("root", Path("/"), ",readonly=on"),
        *shared("work", work),
        *shared("results", results),
    ]


def shared(tag: str, path: Path, more: str = "") -> list[str]:
    """Return the QEMU options that share a host folder; the guest mounts it by its tag."""
    where = str(path).replace(",", ",,")  # QEMU's escape for a comma
    local = f"local,id={tag},path={where},security_model=none,multidevs=remap{more}"
    return ["-fsdev", local, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


def initrd(kernel: DebianKernel) -> bytes:
    """Return the initrd: modules, busybox, and the script that switches to the host's root."""
    dependencies, builtin = (
        (kernel.modules / f"modules.{name}").read_text() for name in ("dep", "builtin")
    )
    modules = in_order(dependencies, MODULES, builtin)
    files = {
        re.sub(r"\.ko\..*", ".ko", Path(module).name): unpack(
            (kernel.modules / module).read_bytes()
        )
        for module in modules
    }
    files["bin/busybox"] = kernel.busybox.read_bytes()
    files["init"] = first_script(list(files)[: len(modules)]).encode()
    return archive(("bin", "lower", "above", "root"), files, dict.fromkeys(TOOLS, "busybox"))


def first_script(modules: Sequence[str]) -> str:
    """Return the initrd's /init: it mounts the host's root and switches to it."""
    return "\n".join(
        [
            "#!/bin/sh",
            "set -eu",
            "export PATH=/bin",
            *(f"insmod /{shlex.quote(module)}" for module in modules),
            f"mount -t 9p -o {SHARE},cache=loose,ro root /lower",
            "mount -t tmpfs -o mode=755,size=90% tmpfs /above",
            "mkdir /above/upper /above/work",
            "mount -t overlay -o lowerdir=/lower,upperdir=/above/upper,workdir=/above/work"
            " overlay /root",
            "mount -t tmpfs -o mode=755 tmpfs /root/run",
            "mkdir /root/run/host",
            f"mount -t 9p -o {SHARE} work /root/run/host",
            "exec switch_root /root /bin/sh /run/host/init",
            "",
        ]
    )


def in_order(dependencies: str, names: Sequence[str], builtin: str = "") -> list[str]:
    """Return the paths of the modules `names` and their dependencies, in the order to load them.

    `dependencies` is the text of modules.dep (format: modules.dep(5); the dependency named last is
    loaded first), `builtin` that of modules.builtin: built-in modules are left out.
    Raises: GateError if a module is missing.
    """
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in dependencies.splitlines():
        path, _colon, rest = line.partition(":")
        needs[path] = rest.split()
        by_name[_module(path)] = path
    there = {_module(path) for path in builtin.splitlines()}
    paths: dict[str, None] = {}
    for name in names:
        if name in there:
            continue
        if name not in by_name:
            raise GateError(f"the test kernel has no module {name}", hint="use another kernel")
        paths.update(dict.fromkeys([*reversed(needs[by_name[name]]), by_name[name]]))
    return list(paths)


def _module(path: str) -> str:
    return re.sub(r"\.ko.*", "", Path(path).name).replace("-", "_")


def archive(folders: Sequence[str], files: Mapping[str, bytes], links: Mapping[str, str]) -> bytes:
    """Return a cpio archive of folders, executable `files`, and symbolic `links` in bin/.

    Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst, "newc".
    """
    parts = [_entry(name, 0o040755, b"") for name in folders]
    parts += [_entry(name, 0o100755, data) for name, data in files.items()]
    parts += [_entry(f"bin/{name}", 0o120777, to.encode()) for name, to in links.items()]
    return b"".join([*parts, _entry("TRAILER!!!", 0, b"")])


def _entry(name: str, mode: int, data: bytes) -> bytes:
    path = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + "".join(f"{number:08x}" for number in numbers).encode() + path
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
