"""Record the state of a host that the commands must not change, as JSON: {kind: {name: value}}.

    /usr/bin/python3 state.py >FILE

Standard library only; run it as root, on the host. It leaves out counters, the clock, loaded
modules, which stay loaded (host-init.sh loads those with devices), and the cgroup that it runs in,
which belongs to the commands.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CGROUPS, BPFFS = Path("/sys/fs/cgroup"), Path("/sys/fs/bpf")
TEXTS = {
    "xfrm state": "ip xfrm state",
    "xfrm policy": "ip xfrm policy",
    "xfrm policy default": "ip xfrm policy getdefault",
    "rule": "ip rule",
    "rule of IPv6": "ip -6 rule",
    "route": "ip route show table all",
    "route of IPv6": "ip -6 route show table all",
    "address": "ip address",
    "neighbour": "ip neighbour show nud permanent",
    "namespace": "ip netns list",
    "mount": "cat /proc/self/mountinfo",
    "unit": "systemctl list-units --all --plain --no-legend --full",
    "IPC": "cat /proc/sysvipc/shm /proc/sysvipc/sem /proc/sysvipc/msg",
    "host name": "cat /proc/sys/kernel/hostname /proc/sys/kernel/domainname",
    "socket": "ss --listening --no-header --tcp --udp --raw --numeric",
    "IKE": "swanctl --list-sas --raw",
    "IKE connection": "swanctl --list-conns",
}
# Lines of the commands themselves, and parts of a line that change by themselves.
UNSTABLE = {
    "unit": re.compile(r"^(commands\.|ipsecgate-room-|run-)"),
    "IKE": re.compile(r"(established|time|since|rekey|life|install|use-in|use-out)[a-z-]*=\d+"),
    "address": re.compile(r"^\s+valid_lft"),
}
CHECKOUT = Path(__file__).parents[2]
"""The commands' own folder, which may change."""
# Folders, and the paths below them that change by themselves or are too many to compare.
FILES = {
    "/etc": None,
    "/var": re.compile(
        r"^/var/(log/journal|lib/systemd/(timers|random-seed)|backups"
        # the packages: somebody else may install one on the machine that runs this host
        r"|(lib|cache|log)/(apt|dpkg)|lib/systemd/deb-systemd-helper)"
    ),
    "/run": re.compile(r"^/run/(host/|systemd/(journal|units|transient|propagate)|log/|utmp)"),
    "/tmp": re.compile(r"^/tmp/pytest-of-"),  # pytest keeps those of its last three runs
    "/root": re.compile(r"^/root/[^/]+/."),
    "/dev/shm": None,
}
CONTENT_BELOW = 1 << 20
# Counters and random numbers of the kernel.
SYSCTLS = re.compile(
    r"/(random/|.*-state$|.*-nr$|.*nr_|.*_id$|ns_last_pid|pty/nr|.*flush$|.*stat.*|.*count$"
    r"|.*/(net/netfilter|binfmt_misc)/)"
)
# linux/bpf.h, enum bpf_cmd
BPF_PROG_NEXT, BPF_MAP_NEXT, BPF_LINK_NEXT, BPF_PROG_FD, BPF_INFO = 11, 12, 31, 13, 15
SYS_BPF = 321


def texts() -> Iterator[tuple[str, dict[str, str]]]:
    for name, command in TEXTS.items():
        run = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        assert run.returncode == 0, (command, run.stderr)
        unstable = UNSTABLE.get(name)
        lines = run.stdout.splitlines()
        if name == "IKE" and unstable:
            lines = [unstable.sub("", line) for line in lines]
        elif unstable:
            lines = [line for line in lines if not unstable.match(line)]
        counted: dict[str, str] = {}
        for line in lines:
            counted[line] = str(int(counted.get(line, "0")) + 1)
        yield name, counted


def files(top: str, unstable: re.Pattern[str] | None) -> dict[str, str]:
    """Return every file with kind, mode, owner, size, time and, in /etc, a hash of its content."""
    found = {}
    for folder, folders, names in os.walk(top):
        paths = {name: Path(folder, name) for name in [*folders, *names]}
        paths = {name: path for name, path in paths.items() if path != CHECKOUT}
        if unstable is not None:
            paths = {name: path for name, path in paths.items() if not unstable.match(str(path))}
        folders[:] = [name for name in folders if name in paths]
        for path in paths.values():
            try:
                found[str(path)] = described(path, top)
            except FileNotFoundError:
                continue
    return found


def described(path: Path, top: str) -> str:
    info = path.lstat()
    words = [stat.filemode(info.st_mode), f"{info.st_uid}:{info.st_gid}"]
    if stat.S_ISLNK(info.st_mode):
        words.append(str(path.readlink()))
    elif stat.S_ISREG(info.st_mode):
        if top == "/etc" and info.st_size < CONTENT_BELOW:
            words.append(hashlib.sha256(path.read_bytes()).hexdigest())
        words.append(f"{info.st_size} {info.st_mtime_ns}")
    return " ".join(words)


def sysctls() -> dict[str, str]:
    found = {}
    for folder, _, names in os.walk("/proc/sys"):
        for name in names:
            path = Path(folder, name)
            if SYSCTLS.search(str(path)):
                continue
            try:
                found[str(path)] = path.read_text(errors="replace").strip()
            except OSError:
                continue
    return found


def cgroups() -> dict[str, str]:
    """Return every cgroup with its settings and processes, except that of the commands."""
    found = {}
    for folder, _, names in os.walk(CGROUPS):
        if "/commands.service" in folder:
            continue
        if folder == str(CGROUPS):
            names.remove("cgroup.procs")  # the kernel's threads
        words = []
        for name in sorted(names):
            if re.search(
                r"\.(max|min|high|low|weight|procs|type|controllers|subtree_control)$", name
            ):
                try:
                    words.append(f"{name}={' '.join((Path(folder, name)).read_text().split())}")
                except OSError:
                    continue
        found[folder] = "; ".join(words)
    return found


def pins() -> dict[str, str]:
    """Return every file of the bpffs with its inode: a pin of another object has another inode."""
    found = {}
    for folder, folders, names in os.walk(BPFFS):
        for name in [*folders, *names]:
            info = Path(folder, name).lstat()
            found[f"{folder}/{name}"] = f"{stat.filemode(info.st_mode)} {info.st_ino}"
    return found


def bpf_objects() -> dict[str, str]:
    """Return the ids of all BPF programs, maps and links in the kernel.

    Of systemd's own programs, only the number of equal ones counts, because systemd replaces them
    whenever it starts a scope with delegated controllers.
    """
    libc, found = ctypes.CDLL(None, use_errno=True), {}
    systemds: Counter[str] = Counter()
    for kind, command in (
        ("program", BPF_PROG_NEXT),
        ("map", BPF_MAP_NEXT),
        ("link", BPF_LINK_NEXT),
    ):
        attributes = (ctypes.c_uint32 * 3)()  # start_id, next_id, open_flags
        while not libc.syscall(SYS_BPF, command, attributes, ctypes.sizeof(attributes)):
            attributes[0] = attributes[1]
            name, tag = program(libc, attributes[1]) if kind == "program" else ("", "")
            if name.startswith("sd_"):  # sd_devices, sd_fw_egress, sd_fw_ingress
                systemds[f"{name} {tag}"] += 1
            else:
                found[f"{kind} {attributes[1]}"] = "there"
    return found | {name: str(count) for name, count in systemds.items()}


def program(libc: ctypes.CDLL, number: int) -> tuple[str, str]:
    """Return the name and the tag of a program, "" if it has just gone."""
    fd = libc.syscall(SYS_BPF, BPF_PROG_FD, (ctypes.c_uint32 * 3)(number), 12)
    if fd < 0:
        return "", ""
    info = ctypes.create_string_buffer(80)  # struct bpf_prog_info up to its name
    attributes = (ctypes.c_uint64 * 2)(fd | len(info) << 32, ctypes.addressof(info))
    try:
        if libc.syscall(SYS_BPF, BPF_INFO, attributes, 16):
            return "", ""
    finally:
        os.close(fd)
    return info.raw[64:80].rstrip(b"\0").decode(), info.raw[8:16].hex()


def settled_bpf_objects() -> dict[str, str]:
    """Return the BPF objects once they are stable: unreferenced ones disappear a moment later."""
    before, now = {"": ""}, bpf_objects()
    while before != now:
        time.sleep(3)
        before, now = now, bpf_objects()
    return now


def processes() -> dict[str, str]:
    """Return all processes outside the commands' cgroup, without kernel threads."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if command and "/commands.service" not in (entry / "cgroup").read_text():
                spaces = [str((entry / "ns" / name).readlink()) for name in ("net", "mnt", "uts")]
                found[f"{entry.name} {command}"] = " ".join(spaces)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def state() -> dict[str, dict[str, str]]:
    return {
        "BPF": settled_bpf_objects(),
        **dict(texts()),
        **{f"files of {top}": files(top, unstable) for top, unstable in FILES.items()},
        "sysctl": sysctls(),
        "cgroup": cgroups(),
        "pin": pins(),
        "process": processes(),
    }


if __name__ == "__main__":
    json.dump(state(), sys.stdout, indent=1, sort_keys=True)
