"""Check the guest's kernel before the other tests: without JIT and BTF they would prove less."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.bpf.libbpf import closing_fd
from ipsecgate.edges.bpf.pins import Pins

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


def test_every_program_of_the_gate_is_machine_code(tmp_path: Path) -> None:
    """If the JIT cannot compile a program, the kernel silently interprets it."""
    code = bytecode.get(Path(os.environ.get("IPSECGATE_TEST_BYTECODE") or tmp_path))
    pins = Pins(Path("/sys/fs/bpf"), f"jit-{os.getpid()}")
    try:
        pins.load(code)
        jited = {}
        for name in code.programs:
            with closing_fd(pins.objects.open_program(name)) as fd:
                lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
            jited[name] = dict(line.split(":\t") for line in lines)["prog_jited"]
    finally:
        pins.unload()
    assert jited == dict.fromkeys(code.programs, "1")
    assert "egress" in jited
