"""Compile bpf/*.bpf.c with BCC and print the bytecode. The only module that imports bcc.

`bytecode` runs `main` as a separate process, with BCC_KERNEL_SOURCE set to the sources, whose
include/ replaces the kernel headers. Compiling needs the right to call bpf(2), because BCC creates
the maps while it compiles; they disappear when the process ends.
"""

from __future__ import annotations

import struct
import sys
from ctypes import string_at
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipsecgate.core.tables.layout import MAPS
from ipsecgate.edges.bpf.bytecode import Bytecode, Program
from ipsecgate.edges.bpf.libbpf import INSN_SIZE, MapShape, map_shape

# One translation unit: BCC rewrites map accesses in the main file only, not in included files.
FILES = (
    "maps.bpf.c",
    "search.bpf.c",
    "decision.bpf.c",
    "gate.bpf.c",
    "packet.bpf.c",
    "backstop.bpf.c",
)

_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1
_CALL = 0x85
_PSEUDO_CALL = 1
# BCC compiles no function that is not inlined. So these are compiled as if they were programs, and
# put behind every hook, which calls them as if they were helpers of these numbers.
FUNCTIONS = {"search": 0x7365, "search_part": 0x7366, "search_policy": 0x7367}
# The maps in a map of maps.
INNER = {"entries": "some_entries", "slots": "some_lines"}


def _module(sources: Path) -> tuple[Any, Any]:
    from bcc import BPF, lib  # noqa: PLC0415  36 ms and 64 MiB: only when compiling

    text = "".join(f'#line 1 "{name}"\n{(sources / name).read_text()}' for name in FILES)
    numbers = [f"-DGATE_{name.upper()}={number}" for name, number in FUNCTIONS.items()]
    return BPF(text=text.encode(), cflags=[f"-I{sources}", *numbers]), lib


def _references(insns: bytes, names: dict[int, str]) -> dict[int, str]:
    found = {}
    for index in range(len(insns) // INSN_SIZE):
        code, registers, _off, imm = struct.unpack_from("=BBhi", insns, index * INSN_SIZE)
        if code == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD:
            found[index] = names[imm]
    return found


def _linked(hook: Program, functions: dict[str, Program]) -> Program:
    """Put the functions that a hook calls behind it, and make their numbers their addresses."""
    parts = [hook]
    starts: dict[int, int] = {}  # of the functions, by number
    length = len(hook.insns) // INSN_SIZE
    for part in parts:  # which grows
        for number in dict.fromkeys(number for _, number in _calls(part.insns)):
            name = next((n for n, known in FUNCTIONS.items() if known == number), None)
            if name is not None and number not in starts:
                starts[number] = length
                parts.append(functions[name])
                length += len(functions[name].insns) // INSN_SIZE
    maps: dict[int, str] = {}
    for start, part in zip((0, *starts.values()), parts, strict=True):
        maps |= {index + start: name for index, name in part.maps.items()}
    code = bytearray(b"".join(part.insns for part in parts))
    for index, number in _calls(bytes(code)):
        if number in starts:
            distance = starts[number] - index - 1
            at = index * INSN_SIZE
            struct.pack_into("=BBhi", code, at, _CALL, _PSEUDO_CALL << 4, 0, distance)
    return Program(bytes(code), maps, tuple(starts.values()))


def _calls(insns: bytes) -> list[tuple[int, int]]:
    """Return where helpers are called, and their numbers."""
    words = enumerate(struct.iter_unpack("=BBhi", insns))
    return [(at, number) for at, (code, regs, _off, number) in words if code == _CALL and not regs]


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
    for name, inner in INNER.items():
        shape = map_shape(lib.bpf_table_fd(module, inner.encode()))
        shapes[name] = replace(shapes[name], inner=shape)
    programs = {}
    for i in range(lib.bpf_num_functions(module)):
        name = lib.bpf_function_name(module, i)
        start = lib.bpf_function_start(module, name)
        insns = string_at(start, lib.bpf_function_size(module, name))
        programs[name.decode()] = Program(insns, _references(insns, fds))
    functions = {name: programs.pop(name) for name in FUNCTIONS}
    return Bytecode({name: _linked(hook, functions) for name, hook in programs.items()}, shapes)


def main(sources: str) -> None:
    """Compile the hooks in a folder and print their bytecode as JSON."""
    sys.stdout.write(compile_hooks(Path(sources)).to_json())
