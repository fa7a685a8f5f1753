"""Compile bpf/*.bpf.c with BCC and print the bytecode. The only module that imports bcc.

`bytecode` runs `main` as a separate process, with BCC_KERNEL_SOURCE set to the sources, whose
include/ replaces the kernel headers. Compiling needs the right to call bpf(2), because BCC creates
the maps while it compiles; they disappear when the process ends.
"""

from __future__ import annotations

import struct
import sys
from ctypes import string_at
from pathlib import Path
from typing import Any

from ipsecgate.core.tables.layout import MAPS
from ipsecgate.edges.bpf.bytecode import Bytecode, Program
from ipsecgate.edges.bpf.libbpf import INSN_SIZE, MapShape, map_shape

# One translation unit: BCC rewrites map accesses in the main file only, not in included files.
FILES = ("maps.bpf.c", "gate.bpf.c", "packet.bpf.c", "backstop.bpf.c")

_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1


def _module(sources: Path) -> tuple[Any, Any]:
    from bcc import BPF, lib  # noqa: PLC0415  36 ms and 64 MiB: only when compiling

    text = "".join(f'#line 1 "{name}"\n{(sources / name).read_text()}' for name in FILES)
    return BPF(text=text.encode(), cflags=[f"-I{sources}"]), lib


def _references(insns: bytes, names: dict[int, str]) -> dict[int, str]:
    found = {}
    for index in range(len(insns) // INSN_SIZE):
        code, registers, _off, imm = struct.unpack_from("=BBhi", insns, index * INSN_SIZE)
        if code == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD:
            found[index] = names[imm]
    return found


def layout(sources: Path) -> dict[str, tuple[str, str]]:
    """Return BCC's description of each map's key and value, as JSON, by the map's name."""
    bpf, lib = _module(sources)
    return {
        name: (
            lib.bpf_table_key_desc(bpf.module, name.encode()).decode(),
            lib.bpf_table_leaf_desc(bpf.module, name.encode()).decode(),
        )
        for name in MAPS
    }


def compile_hooks(sources: Path) -> Bytecode:
    """Compile every hook. Raises: Exception (BCC's own), with clang's output on stderr."""
    bpf, lib = _module(sources)
    module = bpf.module
    fds = {lib.bpf_table_fd(module, name.encode()): name for name in MAPS}
    shapes: dict[str, MapShape] = {name: map_shape(fd) for fd, name in fds.items()}
    programs = {}
    for i in range(lib.bpf_num_functions(module)):
        name = lib.bpf_function_name(module, i)
        start = lib.bpf_function_start(module, name)
        insns = string_at(start, lib.bpf_function_size(module, name))
        programs[name.decode()] = Program(insns, _references(insns, fds))
    return Bytecode(programs, shapes)


def main(sources: str) -> None:
    """Compile the hooks in a folder and print their bytecode as JSON."""
    sys.stdout.write(compile_hooks(Path(sources)).to_json())
