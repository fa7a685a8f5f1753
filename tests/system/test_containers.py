"""Containers whose calls are held during a real negotiation, with each runtime of Debian 12.

`ipsecgate seccomp-profile` makes the profile, the runtimes are unmodified, and static busybox runs
inside. A capture between the hosts shows the packets.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.catalogue import RealClient
from tests.clients.client_lab import ClientLab, End, Outcome, client_lab
from tests.clients.containers import Containers
from tests.clients.daemons import HTTP, PAGE
from tests.system.fd_store import FdStore
from tests.system.under_exec import nothing_in_clear, stopped, wait_held

pytestmark = pytest.mark.second_guest

DEFAULT_PROFILE = Path("/usr/share/containers/seccomp.json")
RUNTIMES = ("crun", "runc")
Profile = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def here(cache: Path) -> Iterator[ClientLab]:
    with client_lab("ipsecgate-test-containers", cache, (HTTP,)) as made:
        yield made


@pytest.fixture
def containers(here: ClientLab) -> Iterator[Containers]:
    # podman accepts no path of more than 50 characters, so not tmp_path.
    with tempfile.TemporaryDirectory(prefix="box-", ignore_cleanup_errors=True) as folder:
        cgroup = here.lab.cgroup(f"{here.gate.instance}/app/containers")
        yield Containers(Path(folder), cgroup)


@pytest.fixture
def profile(here: ClientLab) -> Profile:
    def profile(*options: str) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(here.gate.cli("seccomp-profile", *options).stdout)
        return made

    return profile


def wget(to: object) -> list[str]:
    return ["/bin/busybox", "wget", "-q", "-O", "-", f"http://{to}:{HTTP}/"]


def assert_held(here: ClientLab, outcome: Outcome) -> None:
    assert outcome.served, (outcome, here.gate.log.read_text())
    assert outcome.seen.ike, "a real negotiation"
    assert outcome.seen.esp
    assert not outcome.seen.clear
    assert outcome.retransmitted == 0
    assert outcome.held
    assert not outcome.refused


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("manager", ["oci", "podman"])
def test_calls_of_a_container_are_held(
    here: ClientLab, containers: Containers, profile: Profile, runtime: str, manager: str
) -> None:
    here.without_sa()
    words = {"oci": containers.oci, "podman": containers.podman}[manager]
    argv = words(runtime, "held", wget(here.net), profile("--runtime", runtime))
    outcome = here.run(RealClient(runtime, tuple(argv)), gated=False)
    assert_held(here, outcome)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_is_not_blocked_by_its_own_filter(
    here: ClientLab, containers: Containers, profile: Profile, runtime: str
) -> None:
    """With --udp every sendmsg() is held, even one that would send us the listener."""
    here.without_sa()
    argv = containers.oci(runtime, "udp", wget(here.net), profile("--udp", "--runtime", runtime))
    assert_held(here, here.run(RealClient(runtime, tuple(argv)), gated=False))


def test_a_container_keeps_its_own_profile_for_other_calls(
    here: ClientLab, containers: Containers, profile: Profile, tmp_path: Path
) -> None:
    """Two runs with podman's default profile, one of them without uname()."""
    usual = json.loads(DEFAULT_PROFILE.read_text())
    strict = json.loads(DEFAULT_PROFILE.read_text())
    for rule in strict["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name != "uname"]
    said = {}
    for name, base in {"usual": usual, "strict": strict}.items():
        here.without_sa()
        file = tmp_path / name
        file.write_text(json.dumps(base))
        words = f"{shlex.join(wget(here.net))}; /bin/busybox uname; true"
        argv = containers.podman(
            "crun", name, ["/bin/busybox", "sh", "-c", words], profile("--base", str(file))
        )
        outcome = here.run(RealClient("podman", tuple(argv)), gated=False)
        assert_held(here, outcome)
        said[name] = outcome.output.splitlines()[1:]
    assert said["usual"] == ["Linux"]
    assert said["strict"] != ["Linux"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_process_executed_later_in_a_container_is_held(
    here: ClientLab, containers: Containers, profile: Profile, runtime: str
) -> None:
    """The runtime sends a second message with a listener of its own."""
    sleep = ["/bin/busybox", "sleep", "1000"]
    argv = containers.oci(runtime, "idle", sleep, profile("--runtime", runtime))
    idle = here.lab.a.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    verb = argv[: argv.index("run")]
    here.until(lambda: '"running"' in here.lab.a.run([*verb, "state", "idle"], check=False).stdout)
    here.without_sa()
    execute = RealClient(runtime, (*verb, "exec", "idle", *wget(here.net)))
    outcome = here.run(execute, gated=False)
    assert_held(here, outcome)
    here.lab.a.run([*verb, "kill", "idle", "KILL"])
    idle.wait(60)


def test_a_container_outside_every_gated_cgroup_is_logged(
    here: ClientLab, containers: Containers, profile: Profile
) -> None:
    """Its calls are held, but no hook would refuse them."""
    outside = Containers(containers.root.parent / "outside", here.lab.cgroup("outside"))
    argv = outside.oci("crun", "outside", ["/bin/busybox", "sleep", "1000"], profile())
    warning = "container outside is not gated: the hooks do not check its calls"
    container = here.lab.a.popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    here.until(lambda: warning in here.gate.log.read_text())
    here.lab.a.run([*argv[: argv.index("run")], "kill", "outside", "KILL"])
    container.wait(60)


def test_a_container_of_podman_under_exec_is_held(here: ClientLab, containers: Containers) -> None:
    """The container inherits the filter and needs no profile; a second filter would be refused."""
    here.without_sa()
    beside = here.lab.cgroup(f"{here.gate.instance}/app/podman")
    argv = containers.podman("crun", "inherited", wget(here.net), None)
    outcome = here.run(
        RealClient("podman", tuple(argv)), "--cgroup", str(beside), hold="30s", gated=False
    )
    assert_held(here, outcome)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_gated_container_without_the_profile_is_refused(
    here: ClientLab, containers: Containers, runtime: str
) -> None:
    argv = containers.oci(runtime, "refused", wget(here.forbidden_to), None)
    outcome = here.run(RealClient(runtime, tuple(argv)), gated=False)
    assert outcome.end("EPERM") is End.NAMED
    assert outcome.refused
    assert not outcome.seen.clear


def test_outside_the_container_nothing_changes(here: ClientLab) -> None:
    outcome = here.run(RealClient("wget", tuple(wget(here.forbidden_to))), gated=False)
    assert outcome.served
    assert (outcome.refused, outcome.held) == (0, 0)


def test_a_held_call_of_a_container_outlives_the_controller(
    here: ClientLab, containers: Containers, profile: Profile
) -> None:
    """A service manager stores the listener, as for `exec`."""
    argv = containers.oci("crun", "kept", wget(here.net), profile("--hold", "2m"))
    here.gate.kill()
    try:
        with FdStore() as store:
            store.start(here.gate)
            here.without_sa()
            with nothing_in_clear(here.lab, esp=True):
                with stopped(here.lab):
                    process = here.lab.a.popen(argv, stdout=subprocess.PIPE)
                    wait_held(here.gate)
                    here.until(store.is_given)
                    here.gate.kill()
                assert process.poll() is None
                store.start(here.gate)
                said, _ = process.communicate(timeout=120)
            assert said == f"{PAGE}\n"
    finally:
        here.gate.kill()
        here.gate.start()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_without_a_controller_no_container_starts(
    here: ClientLab, containers: Containers, profile: Profile, runtime: str
) -> None:
    made = profile("--runtime", runtime)
    here.gate.kill()
    try:
        argv = containers.oci(runtime, "alone", wget(here.forbidden_to), made)
        with here.lab.capture() as capture:
            done = here.lab.a.run(argv, check=False)
            seen = capture.stop()
    finally:
        here.gate.start()
    assert done.returncode
    assert not seen.clear
