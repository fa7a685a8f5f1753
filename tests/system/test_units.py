"""The systemd units: valid, strict, and sufficient for the controller."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from ipsecgate.core.codec.seccomp import ABIS
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.pins import Pins
from tests.headers import system_calls
from tests.processes import may_run_first
from tests.system.caller import Caller
from tests.system.controller_process import PORT, ControllerProcess, caller, controller, refused
from tests.system.hooked_cgroup import PEER

__all__ = ["caller", "controller"]

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "packaging/systemd"
EXPOSURE = {
    # 2.7 without CAP_SYS_ADMIN, for the namespaces of containers. Real-time priority is 0.1 of it.
    "ipsecgate.service": 2.9,
    "ipsecgate-load.service": 2.0,
    "ipsecgate-metrics.service": 1.9,
}  # upper limits, of 10
# What loading the hooks needs, and the step that fails without it.
NEEDED = {
    "CAP_BPF": "create map",
    "CAP_NET_ADMIN": "load program",
    "CAP_PERFMON": "load program",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the output of `make install-files` and this system's own units."""
    root = tmp_path_factory.mktemp("root")
    subprocess.run(
        ["make", "-s", "-o", "setup", "install-files", f"DESTDIR={root}"], cwd=ROOT, check=True
    )
    shutil.copytree(
        "/usr/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True,
        dirs_exist_ok=True,
    )  # fmt: skip
    for program in (root / "usr/bin/ipsecgate", root / "bin/mkdir"):
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    return root


def analyze(*words: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *words], capture_output=True, text=True, check=False,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", EXPOSURE)
def test_systemd_analyze_accepts_the_units(root: Path, name: str) -> None:
    done = analyze("verify", f"--root={root}", "--man=no", name)
    assert not [line for line in done.splitlines() if "ipsecgate" in line]
    spoilt = root / "usr/lib/systemd/system/ipsecgate-spoilt.service"
    spoilt.write_text((root / f"usr/lib/systemd/system/{name}").read_text() + "Colour=red\n")
    assert "Colour" in analyze("verify", f"--root={root}", "--man=no", spoilt.name)


@pytest.mark.parametrize(("name", "limit"), EXPOSURE.items())
def test_the_exposure_of_the_units_is_low(root: Path, name: str, limit: float) -> None:
    done = analyze("security", "--offline=true", "--no-pager", f"--root={root}", name)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done)
    assert found, done
    assert float(found[1]) <= limit


def setting(name: str, key: str) -> list[str]:
    lines = (UNITS / name).read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def test_the_units_define_no_step_that_opens_the_gate() -> None:
    for name in EXPOSURE:
        assert not setting(name, "ExecStop")
        assert not setting(name, "ExecStopPost")
        assert setting(name, "RuntimeDirectoryPreserve") == ["yes"]
    assert setting("ipsecgate.service", "Restart") == ["always"]
    before = ["network-pre.target sysinit.target", "shutdown.target"]
    assert setting("ipsecgate-load.service", "Before") == before


# --- the units allow enough --------------------------------------------------------------


@cache
def expand(group: str) -> set[str]:
    """Return the system calls of a group, including its nested groups."""
    calls: set[str] = set()
    done = analyze("syscall-filter", group)
    assert done.startswith(group), done
    for line in done.splitlines()[1:]:
        word = line.strip()
        if word.startswith("@"):
            calls |= expand(word)
        elif word and not word.startswith("#"):
            calls.add(word)
    return calls


def allowed_calls(name: str) -> list[int]:
    """Return the numbers of the system calls that a unit's SystemCallFilter= allows."""
    calls: set[str] = set()
    for line in setting(name, "SystemCallFilter"):
        minus = line.startswith("~")
        for word in line.removeprefix("~").split():
            named = expand(word) if word.startswith("@") else {word}
            calls = calls - named if minus else calls | named
    numbers = system_calls(platform.machine())
    assert numbers is not None, "apt install linux-libc-dev"
    return sorted(numbers[call] for call in calls if call in numbers)


# As systemd does: no new privileges, then a filter that returns EPERM; the kernel enforces W^X
# from 6.3 on.
CONFINE = """
import ctypes, struct
def confine(calls, error):
    bpf = lambda code, k, jt=0, jf=0: struct.pack("=HBBI", code, jt, jf, k)
    program = [bpf(0x20, 4), bpf(0x15, ARCH, 1), bpf(0x06, 0x80000000), bpf(0x20, 0)]
    for call in calls:
        program += [bpf(0x15, call, 0, 1), bpf(0x06, 0x7FFF0000)]
    code = b"".join([*program, bpf(0x06, 0x00050000 | error)])
    text = ctypes.create_string_buffer(code, len(code))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE
    assert not libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    class Fprog(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
    fprog = Fprog(len(code) // 8, ctypes.addressof(text))
    assert not libc.prctl(22, 2, ctypes.byref(fprog), 0, 0), ctypes.get_errno()
""".replace("ARCH", str(ABIS[platform.machine()].arch))


def confined(name: str) -> str:
    return f"{CONFINE}\nconfine({allowed_calls(name)}, {errno.EPERM})\n"


def only(capabilities: tuple[str, ...] | list[str]) -> list[str]:
    names = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in capabilities)
    return ["setpriv", "--bounding-set", f"-all{names}", "--inh-caps=-all", "--no-new-privs"]


def in_unit(
    controller: ControllerProcess, name: str, *words: str
) -> subprocess.CompletedProcess[str]:
    """Run a verb with a unit's capabilities and system calls."""
    program = (
        f"{confined(name)}\nfrom ipsecgate.cli import main\nmain({controller.argv(*words)!r})\n"
    )
    (capabilities,) = setting(name, "CapabilityBoundingSet")
    argv = [*only(capabilities.split()), sys.executable, "-c", program]
    with controller.namespace.inside():
        return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_loading_at_boot_works_inside_its_unit(
    controller: ControllerProcess, caller: Caller
) -> None:
    assert caller("tcp", PEER[4], PORT) == "EINPROGRESS", "nothing is loaded yet"
    done = in_unit(controller, "ipsecgate-load.service", "load", "--attach")
    assert done.returncode == 0, done.stderr
    assert f"gated: {controller.cgroup}" in done.stdout.splitlines()
    assert {a.hook for a in Pins(Path("/sys/fs/bpf"), controller.name).attachments()} == set(HOOKS)
    assert refused(caller)
    assert refused_at(caller, "192.0.2.99"), (
        "also flows that no policy names, as nothing is published yet"
    )


def test_a_boot_in_audit_mode_refuses_nothing(
    controller: ControllerProcess, caller: Caller
) -> None:
    enforcing = controller.config.read_text()
    observing = enforcing.replace("[gate]", '[gate]\nmode = "audit"')
    controller.config.write_text(observing)
    done = in_unit(controller, "ipsecgate-load.service", "load", "--attach")
    assert done.returncode == 0, done.stderr
    assert caller("tcp", PEER[4], PORT) == "EINPROGRESS"
    status = json.loads(controller.cli("--json", "status").stdout)
    assert status["counters"]["audited"] == 1

    controller.config.write_text(enforcing)
    controller.start()
    assert controller.eventually(lambda: refused(caller)), controller.log
    controller.end()
    controller.config.write_text(observing)
    assert controller.cli("load", "--attach").returncode == 0
    assert refused(caller), "only a controller opens what enforces"


def test_a_boot_with_a_broken_configuration_gates_the_previous_targets(
    controller: ControllerProcess, caller: Caller
) -> None:
    controller.start()
    assert controller.hears("READY=1"), controller.log
    controller.end()
    assert controller.cli("unload", "--force").returncode == 0
    assert caller("tcp", PEER[4], PORT) == "EINPROGRESS", "as after a boot"
    controller.config.write_text("[gate")
    done = in_unit(controller, "ipsecgate-load.service", "load", "--attach")
    assert done.returncode == 2
    assert f"now gated: {controller.cgroup}" in " ".join(done.stderr.split())
    assert refused(caller)


def refused_at(caller: Caller, address: str) -> bool:
    return caller("tcp", address, PORT) == "EPERM"


def test_the_controller_works_inside_its_unit(
    controller: ControllerProcess, caller: Caller
) -> None:
    (capabilities,) = setting("ipsecgate.service", "CapabilityBoundingSet")
    controller.start(code=confined("ipsecgate.service"), wrap=only(capabilities.split()))
    assert controller.hears("READY=1"), controller.log
    assert refused(caller)
    assert not refused_at(caller, "192.0.2.99")
    assert "Operation not permitted" not in controller.log
    assert "Traceback" not in controller.log
    done = in_unit(controller, "ipsecgate.service", "--json", "status")
    assert done.returncode == 1, done.stderr
    assert '"alive": true' in done.stdout


def test_the_exporter_works_inside_its_unit(controller: ControllerProcess, tmp_path: Path) -> None:
    name, path = "ipsecgate-metrics.service", tmp_path / "metrics.sock"
    assert controller.cli("load", "--attach").returncode == 0
    done = in_unit(controller, name, "metrics")
    assert done.returncode == 0, done.stderr
    assert "ipsecgate_hooks_up 1.0" in done.stdout
    program = (
        f"{confined(name)}\nfrom ipsecgate.cli import main\n"
        f"main({controller.argv('metrics', '--listen', f'unix:{path}')!r})\n"
    )
    (capabilities,) = setting(name, "CapabilityBoundingSet")
    argv = [*only(capabilities.split()), sys.executable, "-c", program]
    with subprocess.Popen(argv) as process:
        assert controller.eventually(path.exists)
        words = ("curl", "--silent", "--unix-socket", str(path), "http://gate/metrics")
        answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        process.terminate()
    assert "ipsecgate_hooks_up 1.0" in answer
    assert "ipsecgate_controller_up 0.0" in answer
    assert process.returncode == 0


@pytest.mark.parametrize(("missing", "step"), NEEDED.items())
def test_each_capability_is_needed(controller: ControllerProcess, missing: str, step: str) -> None:
    def load(capabilities: list[str]) -> subprocess.CompletedProcess[str]:
        argv = [*only(capabilities), sys.executable, "-m", "ipsecgate", *controller.argv("load")]
        with controller.namespace.inside():
            return subprocess.run(argv, capture_output=True, text=True, check=False)

    done = load([capability for capability in NEEDED if capability != missing])
    assert done.returncode != 0
    assert f"load: {step}" in done.stderr
    done = load([*NEEDED])
    assert done.returncode == 0, done.stderr


def test_a_system_call_outside_the_filter_fails(controller: ControllerProcess) -> None:
    """The filter of these tests works."""
    code = f"{confined('ipsecgate.service')}\nimport os\nos.chown('/tmp', 0, 0)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr


CONNECT = f"import socket; socket.create_connection(({PEER[4]!r}, {PORT}), 20)"


@pytest.mark.parametrize("without", ["", "CAP_SYS_PTRACE"])
def test_holding_calls_needs_the_capability_to_take_a_listener(
    controller: ControllerProcess, without: str
) -> None:
    (capabilities,) = setting("ipsecgate.service", "CapabilityBoundingSet")
    allowed = [name for name in capabilities.split() if name != without]
    (nice,), (priority,) = (setting("ipsecgate.service", key) for key in ("Nice", "LimitRTPRIO"))
    wrap = ["nice", "-n", nice, "prlimit", f"--rtprio={priority}", *only(allowed)]
    controller.start(code=confined("ipsecgate.service"), wrap=wrap)
    assert controller.hears("READY=1"), controller.log
    words = ("exec", "--hold", "1s", "--cgroup", str(controller.cgroup), "--", sys.executable, "-c")
    done = controller.cli(*words, CONNECT)
    assert done.returncode != 0, "there is no IKE daemon to end the wait"
    assert ("TimeoutError" in done.stderr) is (not without), "held to its limit"
    if not without:
        assert controller.eventually(lambda: "was held for" in controller.log), controller.log
    assert ("was held for" in controller.log) is (not without), controller.log
    said = " ".join(done.stderr.split())
    assert ("pidfd_getfd: Operation not permitted" in said) is bool(without)
    # The flag stays after the controller had real-time priority for an answer.
    pid = controller.ask()["pid"]
    flag = os.SCHED_RESET_ON_FORK if may_run_first() and not without else 0
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER | flag
    assert os.getpriority(os.PRIO_PROCESS, pid) == int(nice)


@pytest.mark.parametrize("without", ["", "CAP_SYS_ADMIN"])
def test_following_a_container_needs_the_capability_to_enter_its_namespace(
    controller: ControllerProcess, without: str
) -> None:
    (capabilities,) = setting("ipsecgate.service", "CapabilityBoundingSet")
    assert setting("ipsecgate.service", "RestrictNamespaces") == ["net"]
    allowed = [name for name in capabilities.split() if name != without]
    controller.start(code=confined("ipsecgate.service"), wrap=only(allowed))
    assert controller.hears("READY=1"), controller.log
    join = 'echo 0 >"$0" && exec unshare --net sleep 1000'
    process = subprocess.Popen(["sh", "-c", join, str(controller.cgroup / "cgroup.procs")])
    try:
        if without:
            said = (
                "cannot enter the network namespaces of containers (setns: Operation not permitted)"
            )
            assert controller.eventually(
                lambda: any(said in error["text"] for error in controller.ask()["errors"])
            ), controller.log
            assert controller.ask()["namespaces"] == []
        else:
            assert controller.eventually(
                lambda: [item["pid"] for item in controller.ask()["namespaces"]] == [process.pid]
            ), controller.log
    finally:
        process.kill()
        process.wait()
    assert controller.eventually(lambda: controller.ask()["namespaces"] == []), controller.log
