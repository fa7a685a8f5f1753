"""User-mode-linux on a CPU with more register state than it saves: see tests/guest/amx.py."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ipsecgate.lab import xstate
from tests.guest.marks import where_guests_run

pytestmark = where_guests_run

GUEST = (
    "from ipsecgate.lab.guest import main; sys.exit(main(['--kernel', 'uml', '--', *sys.argv[1:]]))"
)
WITHOUT_THE_LIBRARY = "from ipsecgate.lab import xstate; xstate.needed = lambda: False"
SIZE = 2_000_000


def in_guest(*argv: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a guest, on a kernel that behaves as on a CPU with AMX."""
    ours = [sys.executable, "-c", f"import sys; {before or 'pass'}; {GUEST}", *argv]
    return subprocess.run(
        [sys.executable, "-m", "tests.guest.amx", *ours],
        capture_output=True,
        text=True,
        check=False,
    )


def refusals(stderr: str) -> int:
    return int(stderr.rpartition("CPU with AMX: ")[2].split()[0])


def test_a_guest_boots_and_its_tasks_keep_their_registers() -> None:
    """Run three at a time, so that each has vector registers in use when another gets the CPU."""
    one = f"head -c {SIZE} /dev/zero | sha256sum"
    done = in_guest("sh", "-c", f"for i in 1 2 3; do ({one}) & done; wait")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [hashlib.sha256(bytes(SIZE)).hexdigest(), "-"] * 3
    assert 0 < refusals(done.stderr) < 10, "after the first it writes whole areas at once"


def test_without_the_library_it_panics_and_shows_its_console() -> None:
    """Without this check the test above could pass even if the library did nothing."""
    done = in_guest("true", before=WITHOUT_THE_LIBRARY)
    assert done.returncode == 125
    assert refusals(done.stderr) == 1
    assert "panicked before its command began" in done.stderr
    assert "Kernel panic - not syncing: Attempted to kill init!" in done.stderr
    assert "ptrace set fp regs failed, errno = 14" in done.stderr


def test_fits_matches_the_cpu_and_the_simulation() -> None:
    ask = "from ipsecgate.lab import xstate; print(xstate.fits())"
    ours = [sys.executable, "-c", ask]
    refused = [sys.executable, "-m", "tests.guest.amx", *ours]
    flags = Path("/proc/cpuinfo").read_text().split()
    here = subprocess.run(ours, capture_output=True, text=True, check=True).stdout
    there = subprocess.run(refused, capture_output=True, text=True, check=True).stdout
    assert (here, there) == (f"{'amx_tile' not in flags}\n", "False\n")


@pytest.mark.parametrize("compiler", xstate.COMPILERS)
def test_each_compiler_builds_the_library_and_its_component_masks_are_right(
    compiler: str, tmp_path: Path
) -> None:
    """Bits of XSTATE_BV and offsets: Intel SDM volume 1, table 13-1 and CPUID leaf 0xd."""
    assert shutil.which(compiler), "make setup installs tcc for the tests"
    built = tmp_path / "xstate.so"
    xstate.build(built, compiler)
    at_576, before_avx, with_avx, kept = components_within(built, 576, 831, 832, xstate.KEPT)
    x87_and_sse, avx, amx = 0b11, 1 << 2, 0b11 << 17
    assert at_576 == x87_and_sse
    assert before_avx & avx == 0
    assert with_avx & avx == avx
    assert kept & amx == 0


def components_within(library: Path, *sizes: int) -> list[int]:
    """Call the library preloaded, as it is used.

    dlopen() fails: glibc 2.41 refuses a library without PT_GNU_STACK, which tcc does not write.
    """
    ask = (
        "import ctypes, sys\n"
        "within = ctypes.CDLL(None).components_within\n"
        "within.restype, within.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)\n"
        "print(*(within(int(size)) for size in sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask, *map(str, sizes)],
        env={"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in done.stdout.split()]


def test_the_library_is_built_once(tmp_path: Path) -> None:
    first = xstate.library(tmp_path)
    made = first.stat().st_mtime_ns
    assert xstate.library(tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert {path.name for path in tmp_path.iterdir()} == {".lock", first.name}
