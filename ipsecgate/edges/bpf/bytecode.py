"""The hooks' bytecode: what the package ships, else what was compiled here once and cached.

Either is found by a hash of the C sources, so it is never that of another version. The hash of a
cached file includes the compiler. The compiler (`compiler`) runs as a separate process: LLVM takes
60 MiB and changes the working directory, and a warm start needs neither. No other user may be able
to change a file with bytecode (see `trust`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ipsecgate import trust
from ipsecgate.core.model.value import value
from ipsecgate.edges.bpf.libbpf import INSN_SIZE, MapShape
from ipsecgate.errors import GateError, KernelLacksError

log = logging.getLogger("ipsecgate")

_PACKAGE = Path(__file__).resolve().parents[2]
_LIBBCC = "libbcc.so.0"
_COMPILER = """
import sys
sys.path.insert(0, sys.argv[1])
from ipsecgate.edges.bpf.compiler import main
main(sys.argv[2])
"""


@value
class Program:
    """Instructions; the map whose descriptor one loads, by index; where called functions begin."""

    insns: bytes
    maps: Mapping[int, str]
    functions: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """Return six hexadecimal digits that other instructions would hardly have."""
        text = f"{sorted(self.maps.items())} {self.functions}"
        return hashlib.sha256(self.insns + text.encode()).hexdigest()[:6]

    def linked(self, fds: Mapping[str, int]) -> bytes:
        """Return the instructions with each map's descriptor filled in."""
        code = bytearray(self.insns)
        for index, name in self.maps.items():
            struct.pack_into("=i", code, index * INSN_SIZE + 4, fds[name])
        return bytes(code)


@value
class Bytecode:
    """Everything that the loader needs: programs by hook and maps by name."""

    programs: Mapping[str, Program]
    maps: Mapping[str, MapShape]

    def to_json(self) -> str:
        """Serialise for the cache."""
        programs = {
            name: {
                "insns": b64encode(p.insns).decode(),
                "maps": {str(i): m for i, m in p.maps.items()},
                "functions": p.functions,
            }
            for name, p in self.programs.items()
        }
        return json.dumps(
            {"programs": programs, "maps": {n: asdict(s) for n, s in self.maps.items()}}
        )

    @classmethod
    def from_json(cls, text: str) -> Bytecode:
        """Read what `to_json` wrote. Raises: ValueError, KeyError, TypeError."""
        data = json.loads(text)
        programs = {
            name: Program(
                b64decode(p["insns"]),
                {int(i): m for i, m in p["maps"].items()},
                tuple(int(start) for start in p["functions"]),
            )
            for name, p in data["programs"].items()
        }
        return cls(programs, {name: _shape(shape) for name, shape in data["maps"].items()})


def _shape(data: dict[str, Any]) -> MapShape:
    inner = data.pop("inner")
    return MapShape(**data, inner=None if inner is None else _shape(inner))


def source_dir() -> Path:
    """Return the folder of the C sources: the package's, or bpf/ in a checkout."""
    packaged = _PACKAGE / "_bpf"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "bpf"


def compiler_version() -> str:
    """Return the name of libbcc's file, which has its version; "" if BCC is not installed."""
    libraries = sorted(Path("/usr/lib").glob(f"*/{_LIBBCC}"))
    return libraries[0].resolve().name if libraries else ""


def _key(compiler: str) -> str:
    """Return a hash of the sources, the machine's architecture and the compiler's version."""
    digest = hashlib.sha256(f"{compiler} {os.uname().machine}\n".encode())
    for path in sorted(source_dir().rglob("*.[ch]")):
        digest.update(f"{path.relative_to(source_dir())}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def get(cache: Path) -> Bytecode:
    """Return the bytecode that is shipped or cached, or compile it and cache it.

    Raises: KernelLacksError without BCC; GateError if compiling fails; UntrustedError.
    """
    for path in filter(Path.is_file, (shipped(), cached(cache))):
        trust.folder(path.parent)
        # A file that was truncated, for example by a full disk, is ignored.
        with suppress(ValueError, KeyError, TypeError):
            return Bytecode.from_json(trust.read(path))
    bytecode = compiled()
    _cache(cached(cache), bytecode)
    return bytecode


def find(cache: Path) -> Path | None:
    """Return the file with this version's bytecode, or None if `get` has to compile it."""
    return next(filter(Path.is_file, (shipped(), cached(cache))), None)


def shipped() -> Path:
    """Return the path of the bytecode that a package ships, whether it exists or not."""
    return _PACKAGE / "_bytecode" / f"{_key('')}.json"


def cached(cache: Path) -> Path:
    """Return the path of this version's bytecode in the cache folder, whether it exists or not."""
    return cache / f"{_key(compiler_version())}.json"


def ship() -> None:
    """Compile the hooks and save them beside this program, where `shipped` finds them.

    Raises: as `compiled`; OSError.
    """
    shipped().parent.mkdir(exist_ok=True)
    shipped().write_text(compiled().to_json())


def compiled() -> Bytecode:
    """Compile the hooks. Raises: KernelLacksError without BCC; GateError if compiling fails."""
    if not compiler_version():
        raise KernelLacksError(
            "the hooks are not compiled yet, and BCC is not installed",
            hint="apt install python3-bpfcc",
        )
    sources = str(source_dir())
    # -I: neither the current folder nor PYTHONPATH may decide which modules root runs.
    run = trust.run(
        [sys.executable, "-I", "-c", _COMPILER, str(_PACKAGE.parent), sources],
        {"BCC_KERNEL_SOURCE": sources},
    )
    if run.returncode:
        last = "\n".join(run.stderr.strip().splitlines()[-12:])
        raise GateError(
            "compiling the hooks failed",
            evidence=last,
            hint="if bcc cannot be imported: apt install python3-bpfcc, and make the virtual "
            "environment with --system-site-packages",
        )
    return Bytecode.from_json(run.stdout)


def _cache(path: Path, bytecode: Bytecode) -> None:
    aside = path.with_suffix(f".{os.getpid()}")
    try:
        trust.folder(path.parent)
        aside.write_text(bytecode.to_json())
        aside.replace(path)
    except OSError as error:  # for example a full disk: the next start compiles again
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        log.warning("cannot save the compiled hooks in %s: %s", path.parent, error.strerror)
