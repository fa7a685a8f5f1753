"""The hooks' bytecode, compiled ahead of time and kept by a hash of what made it.

The compiler (`compiler`) runs as a process of its own: LLVM takes 60 MiB and a
chdir(), and a warm start needs neither. A cached file is as trusted as the
folder it lies in, so the folder must belong to root or to the caller.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import struct
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ipsecgate.edges.libbpf import INSN_SIZE, MapShape
from ipsecgate.errors import GateError, KernelLacksError

log = logging.getLogger("ipsecgate")

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBBCC = "libbcc.so.0"


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions, and which of them (by index) load which map's descriptor."""

    insns: bytes
    maps: Mapping[int, str]

    def linked(self, fds: Mapping[str, int]) -> bytes:
        """Return the instructions with each map reference set to a descriptor."""
        code = bytearray(self.insns)
        for index, name in self.maps.items():
            struct.pack_into("=i", code, index * INSN_SIZE + 4, fds[name])
        return bytes(code)


@dataclass(frozen=True, slots=True)
class Bytecode:
    """Everything the loader needs: programs by hook and maps by name."""

    programs: Mapping[str, Program]
    maps: Mapping[str, MapShape]

    def to_json(self) -> str:
        """Serialise for the cache."""
        programs = {
            name: {
                "insns": b64encode(p.insns).decode(),
                "maps": {str(i): m for i, m in p.maps.items()},
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
            name: Program(b64decode(p["insns"]), {int(i): m for i, m in p["maps"].items()})
            for name, p in data["programs"].items()
        }
        return cls(programs, {name: MapShape(**shape) for name, shape in data["maps"].items()})


def source_dir() -> Path:
    """Return the folder of the C sources: packaged, or the checkout's bpf/."""
    packaged = _PACKAGE / "_bpf"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "bpf"


def compiler_version() -> str:
    """Return libbcc's file version, "" where BCC is not installed."""
    libraries = sorted(Path("/usr/lib").glob(f"*/{_LIBBCC}"))
    return libraries[0].resolve().name if libraries else ""


def cache_key() -> str:
    """Hash of the sources, their compiler and the machine's architecture."""
    digest = hashlib.sha256(f"{compiler_version()} {platform.machine()}\n".encode())
    for path in sorted(source_dir().rglob("*.[ch]")):
        digest.update(f"{path.relative_to(source_dir())}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def get(cache: Path) -> Bytecode:
    """Return the bytecode, from the cache folder or compiled into it.

    Raises: KernelLacksError without BCC, GateError if compiling fails.
    """
    path = cache / f"{cache_key()}.json"
    if path.is_file() and path.stat().st_uid in (0, os.geteuid()):
        try:
            return Bytecode.from_json(path.read_text())
        except (ValueError, KeyError, TypeError):
            path.unlink()  # cut short by a full disk, say: make it again
    return _compile(path)


def _compile(path: Path) -> Bytecode:
    if not compiler_version():
        raise KernelLacksError(
            "the hooks are not compiled yet and BCC is not installed",
            hint="apt install python3-bpfcc",
        )
    run = subprocess.run(
        [sys.executable, "-m", "ipsecgate.edges.compiler", str(source_dir())],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(_PACKAGE.parent),
            "BCC_KERNEL_SOURCE": str(source_dir()),
        },
    )
    if run.returncode:
        last = "\n".join(run.stderr.strip().splitlines()[-12:])
        raise GateError(
            f"compiling the hooks failed:\n{last}",
            hint="python3-bpfcc must be importable: use a venv made with --system-site-packages",
        )
    bytecode = Bytecode.from_json(run.stdout)
    aside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        aside.write_text(run.stdout)
        aside.replace(path)
    except OSError as error:  # a full disk, say: the next start compiles again
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        log.warning("cannot keep the compiled hooks in %s: %s", path.parent, error.strerror)
    return bytecode
