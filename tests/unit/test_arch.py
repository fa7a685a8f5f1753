"""System call and audit numbers per machine, compared with the kernel's headers.

aarch64 uses the numbers of asm-generic, which linux-libc-dev has on every machine; those of x86-64
are only on x86-64. A missing header fails the test, unless it is another machine's.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from ipsecgate.core.codec.oci import ARCHITECTURES
from ipsecgate.core.codec.seccomp import ABIS
from ipsecgate.errors import GateError
from ipsecgate.lab import kernel, prepare
from tests.headers import system_calls

INCLUDE = Path("/usr/include")
CALLS = ("seccomp", "connect", "sendto", "sendmsg", "sendmmsg")
EM = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
SIXTY_FOUR, LITTLE_ENDIAN = 0x80000000, 0x40000000


def defined(header: str, name: str) -> str:
    path = INCLUDE / header
    assert path.is_file(), f"{path} is missing: apt install linux-libc-dev"
    found = re.search(rf"^#define {name}\s+(.+)$", path.read_text(), re.MULTILINE)
    assert found, f"no {name} in {path}"
    return found[1].strip()


def test_this_machine_has_system_call_numbers() -> None:
    assert platform.machine() in ABIS
    assert ABIS.keys() == EM.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("machine", EM)
def test_system_call_numbers_equal_the_kernel_headers(machine: str) -> None:
    numbers = system_calls(machine)
    if numbers is None:
        assert machine != platform.machine(), "apt install linux-libc-dev"
        pytest.skip(f"missing: {machine}'s linux-libc-dev")
    assert {name: getattr(ABIS[machine], name) for name in CALLS} == {
        name: numbers[name] for name in CALLS
    }
    assert numbers["pidfd_getfd"] == 438


@pytest.mark.parametrize("machine", EM)
def test_audit_architectures_equal_the_kernel_headers(machine: str) -> None:
    name = EM[machine]
    bits = {"__AUDIT_ARCH_64BIT": SIXTY_FOUR, "__AUDIT_ARCH_LE": LITTLE_ENDIAN}
    assert {bit: int(defined("linux/audit.h", bit), 16) for bit in bits} == bits
    words = defined("linux/audit.h", f"AUDIT_ARCH_{machine.upper()}").strip("()").split("|")
    assert {*words} == {name, *bits}
    number = int(defined("linux/elf-em.h", name).split()[0])
    assert ABIS[machine].arch == number | SIXTY_FOUR | LITTLE_ENDIAN


def test_setup_goes_on_where_debian_has_no_test_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(prepare, "missing_feature", lambda: "ESP")
    assert prepare.main(["--packages"]) == 0
    assert capsys.readouterr().out == ""
    assert prepare.main([]) == 0
    assert "no user-mode-linux for aarch64: boot a kernel with ESP" in capsys.readouterr().out


def test_without_a_test_kernel_from_debian_the_error_names_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt-get is not run: PATH is empty."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GateError, match="no user-mode-linux for aarch64") as caught:
        kernel.fetch(tmp_path)
    assert "a kernel with ESP" in caught.value.hint
