"""Debian's kernel under QEMU on this machine: input, output, and that nothing is left behind."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from ipsecgate.lab import debian
from ipsecgate.lab.guest import GuestHung, GuestPanicked, GuestResult, run
from ipsecgate.lab.kernel import default_cache
from tests.guest.broken import without_modules
from tests.guest.probe_script import MARKER_FILE, ODD, SCRIPT, folder_of
from tests.processes import descendants, outlived

pytestmark = pytest.mark.skipif(
    shutil.which(debian.QEMU) is None, reason="QEMU is not installed: see make test-qemu"
)


@pytest.fixture(scope="module")
def kernel() -> debian.DebianKernel:
    return debian.fetch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guest") / "a 'quoted', folder"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def probed(folder: Path, lines: list[str], kernel: debian.DebianKernel) -> GuestResult:
    env = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "ODD": ODD}
    return run(
        ["sh", "-c", SCRIPT],
        env=env,
        cwd=folder,
        timeout=300,
        results=folder / "results",
        on_output=lines.append,
        kernel=kernel,
    )


def test_folder_and_environment_arrive_and_the_exit_code_returns(
    probed: GuestResult, folder: Path
) -> None:
    assert f"cwd={folder}\nodd={ODD}\nhome=unset\nuid=0\n" in probed.output
    clock = int(probed.output.partition("clock=")[2].partition("\n")[0])
    assert abs(clock - time.time()) < 120
    assert probed.exit_code == 7


def test_output_is_complete_and_unchanged(probed: GuestResult, lines: list[str]) -> None:
    numbers = "".join(f"{number}\n" for number in range(1, 20001))
    assert probed.output.endswith(f"cr?\n{numbers}no newline at the end")
    assert "\r" not in probed.output
    assert "".join(lines) == probed.output


def test_results_come_back_and_nothing_else_does(probed: GuestResult, folder: Path) -> None:
    assert probed.files == (folder / "results/sub/junit.xml",)
    assert probed.files[0].read_text() == "<testsuite/>\n"
    assert not MARKER_FILE.exists()


def test_kernel_has_what_the_tests_need(probed: GuestResult) -> None:
    assert "proto esp spi 0x00000100" in probed.output
    assert "fs=cgroup2fs\nfs=bpf_fs\nveth\n" in probed.output


def test_hung_guest_is_killed_in_time_and_reported(
    kernel: debian.DebianKernel, probed: GuestResult
) -> None:
    pids = set[int]()

    def record_processes(line: str) -> None:
        if line == "hanging\n":
            pids.update(descendants(os.getpid()))

    limit = 10 + 2 * probed.seconds  # a boot takes 6 s, on a busy machine much more
    began = time.monotonic()
    script = 'echo "$IPSECGATE_RESULTS"; echo hanging; sleep 1000'
    with pytest.raises(GuestHung, match="killed after") as caught:
        run(["sh", "-c", script], timeout=limit, on_output=record_processes, kernel=kernel)
    assert time.monotonic() - began < limit + 5
    assert "\nhanging\n" in caught.value.output
    assert pids
    assert not outlived(pids)
    assert not folder_of(caught.value.output).exists()


@pytest.mark.parametrize(
    ("key", "how"),
    [("c", "sysrq triggered crash"), ("b", "stopped while its command ran")],
    ids=["panic", "reset"],
)
def test_a_guest_that_stops_too_early_is_an_error(
    key: str, how: str, kernel: debian.DebianKernel
) -> None:
    def go_on(line: str) -> None:
        """Once the output has arrived, let the guest stop."""
        if line.startswith("/"):
            Path(line.strip(), "go").touch()

    wait = 'echo "$IPSECGATE_RESULTS"; until [ -e "$IPSECGATE_RESULTS/go" ]; do sleep 0.1; done'
    script = f"{wait}; echo {key} >/proc/sysrq-trigger; sleep 1000"
    with pytest.raises(GuestPanicked) as caught:
        run(["sh", "-c", script], timeout=180, on_output=go_on, kernel=kernel)
    assert how in f"{caught.value}\n{caught.value.output}"
    assert not folder_of(caught.value.output).exists()


def test_qemu_is_taken_where_user_mode_linux_does_not_boot(
    kernel: debian.DebianKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without modules the real user-mode-linux panics before the command begins."""
    without_modules(tmp_path)
    (tmp_path / debian.META).symlink_to(default_cache() / debian.META)
    monkeypatch.setenv("IPSECGATE_LAB_CACHE", str(tmp_path))
    progress: list[str] = []
    result = run(["uname", "-r"], timeout=120, progress=progress.append)
    assert (result.exit_code, result.output) == (0, f"{kernel.release}\n")
    report = "\n".join(progress)
    assert "panicked before its command began" in report
    assert "overlay.ko" in report
    assert progress[-1] == "trying QEMU, which is slower"
