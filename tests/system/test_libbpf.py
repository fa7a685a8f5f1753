"""Errors of libbpf and the verifier reach the caller with their messages."""

from __future__ import annotations

import os
import struct

import pytest

from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.objects import HOOKS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="missing: root")

MOVE, EXIT = 0xB7, 0x95  # BPF_ALU64|MOV|K, BPF_JMP|EXIT


def instruction(code: int, value: int = 0) -> bytes:
    """Encode struct bpf_insn on register 0."""
    return struct.pack("=BBhi", code, 0, 0, value)


def test_the_verifiers_message_is_in_the_error() -> None:
    """The same program without its mistake loads."""
    with pytest.raises(OSError, match=r"load program connect4: [^\n]+\n(?s:.*)R0 !read_ok"):
        libbpf.load_program("connect4", instruction(EXIT), *HOOKS["connect4"])
    allowed = instruction(MOVE, 1) + instruction(EXIT)
    os.close(libbpf.load_program("connect4", allowed, *HOOKS["connect4"]))
