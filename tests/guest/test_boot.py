"""Real guests on this machine: input, output, and that nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ipsecgate.lab import uml
from ipsecgate.lab.guest import GuestHung, GuestPanicked, GuestResult, run
from tests.guest.marks import where_guests_run
from tests.guest.probe_script import MARKER_FILE, ODD, SCRIPT, folder_of
from tests.processes import descendants, outlived

pytestmark = where_guests_run

# --- one guest, whose output shows how it was set up -----------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guest") / "a 'quoted' folder"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def probed(folder: Path, lines: list[str]) -> GuestResult:
    folder.mkdir()
    env = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "ODD": ODD}
    return run(
        ["sh", "-c", SCRIPT],
        env=env,
        cwd=folder,
        timeout=120,
        results=folder / "results",
        on_output=lines.append,
    )


def test_exit_code_is_passed_on(probed: GuestResult) -> None:
    assert probed.exit_code == 7


def test_folder_and_environment_arrive(probed: GuestResult, folder: Path) -> None:
    assert f"cwd={folder}\nodd={ODD}\nhome=unset\nuid=0\n" in probed.output


def test_output_is_complete_and_unchanged(probed: GuestResult, lines: list[str]) -> None:
    numbers = "".join(f"{number}\n" for number in range(1, 20001))
    assert probed.output.endswith(f"cr?\n{numbers}no newline at the end")
    assert "\r" not in probed.output
    assert "".join(lines) == probed.output


def test_results_come_back(probed: GuestResult, folder: Path) -> None:
    assert probed.files == (folder / "results/sub/junit.xml",)
    assert probed.files[0].read_text() == "<testsuite/>\n"


def test_host_is_unchanged(probed: GuestResult) -> None:
    assert not MARKER_FILE.exists()


def test_kernel_has_what_the_tests_need(probed: GuestResult) -> None:
    assert "proto esp spi 0x00000100" in probed.output
    assert "fs=cgroup2fs\nfs=bpf_fs\nveth\n" in probed.output


def test_clock_is_right(probed: GuestResult) -> None:
    clock = int(probed.output.partition("clock=")[2].partition("\n")[0])
    assert abs(clock - time.time()) < 60


# --- several ---------------------------------------------------------------------


def test_two_guests_at_a_time_are_isolated() -> None:
    def guest(number: int) -> tuple[int, str]:
        script = f"echo {number} >/tmp/mine; sleep 2; cat /tmp/mine; exit {number}"
        result = run(["sh", "-c", script], timeout=120)
        return result.exit_code, result.output

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(guest, [0, 3])) == [(0, "0\n"), (3, "3\n")]


# --- failures --------------------------------------------------------------------


@pytest.mark.parametrize("leashed", [True, False])
def test_hung_guest_is_killed_in_time_and_reported(
    leashed: bool, probed: GuestResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not leashed:  # as for a caller who may not create a pid namespace
        monkeypatch.setattr(uml, "_leash", tuple)
    pids = set[int]()

    def record_processes(line: str) -> None:
        if line == "hanging\n":
            pids.update(descendants(os.getpid()))

    limit = max(25.0, 4 * probed.seconds)  # a boot, and more on a busy machine
    began = time.monotonic()
    script = 'echo "$IPSECGATE_RESULTS"; echo hanging; sleep 1000'
    with pytest.raises(GuestHung, match="killed after") as caught:
        run(["sh", "-c", script], timeout=limit, on_output=record_processes)
    assert time.monotonic() - began < limit + 30
    assert "\nhanging\n" in caught.value.output
    assert caught.value.hint
    assert len(pids) > 3
    assert not outlived(pids)
    assert not folder_of(caught.value.output).exists()


def test_panic_is_reported_with_the_kernels_message() -> None:
    folders: list[Path] = []

    def let_it_panic(line: str) -> None:
        """Once the output has arrived, let the guest panic."""
        if line.startswith("/"):
            folders.append(Path(line.strip()))
        if line == "last words\n":
            (folders[0] / "go").touch()

    output = 'echo "$IPSECGATE_RESULTS"; echo last words'
    wait = 'until [ -e "$IPSECGATE_RESULTS/go" ]; do sleep 0.1; done'
    script = f"{output}; {wait}; echo c >/proc/sysrq-trigger; sleep 1000"
    with pytest.raises(GuestPanicked) as caught:
        run(["sh", "-c", script], timeout=120, on_output=let_it_panic)
    assert "\nlast words\n" in caught.value.output
    assert "Kernel panic - not syncing: sysrq triggered crash" in caught.value.output
    assert not folder_of(caught.value.output).exists()


def test_a_guest_that_powers_off_too_early_is_an_error() -> None:
    with pytest.raises(GuestPanicked, match="stopped while"):
        run(["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 1000"], timeout=120)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_guest_dies_with_us(number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "ipsecgate.lab.guest", "--always", "--timeout", "60"]
    command += ["--", "sh", "-c", "echo $IPSECGATE_RESULTS; sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        folder = folder_of(ours.stdout.readline())
        pids = descendants(ours.pid)
        ours.send_signal(number)
        assert ours.wait(timeout=30) == code
    assert len(pids) > 3
    assert not outlived(pids)
    if number == signal.SIGKILL:  # the owner could not remove it
        shutil.rmtree(folder)
    assert not folder.exists()


def test_command_line_passes_on_output_and_exit_code() -> None:
    command = [sys.executable, "-m", "ipsecgate.lab.guest", "--always", "--"]
    done = subprocess.run(
        [*command, "sh", "-c", "echo out; exit 9"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (9, "out\n")
