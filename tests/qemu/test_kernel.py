"""Which kernel is this? Runs inside the guest, before the proofs; fails where they'd prove less."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

JIT = Path("/proc/sys/net/core/bpf_jit_enable")
BTF = Path("/sys/kernel/btf/vmlinux")


def test_programs_are_machine_code_and_types_are_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    jit = JIT.read_text().strip()
    size = BTF.stat().st_size
    with capsys.disabled():
        print(f"\nkernel {platform.release()}, bpf_jit_enable={jit}, {BTF} {size} bytes")  # noqa: T201
    assert jit in ("1", "2")
    assert size > 0
