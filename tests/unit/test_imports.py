"""Which package may import which: the architecture, enforced.

    cli -> controller, monitor -> admin -> edges -> core;   lab -> edges, core;   cli.demo -> lab

Within core and within edges the order is that of CORE and EDGES below: a package imports from
itself and from those that it names. Core imports only the parts of the standard library
in PURE, so it can touch no socket, file, process or clock. Each outside library is imported in one
place.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ipsecgate

PACKAGE = Path(ipsecgate.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Outside library -> the packages that may import it (by prefix, below ipsecgate).
OUTSIDE = {
    "bcc": ("edges.bpf.compiler",),
    "pyroute2": ("lab.",),
    "vici": ("edges.strongswan.", "lab."),
    "click": ("cli.", "lab."),
    "rich": ("cli.",),
    "prometheus_client": ("monitor.", "cli.metrics"),
}

# What core may import of the standard library: nothing that reaches outside the process.
PURE = {
    "__future__", "bisect", "collections", "dataclasses", "difflib", "enum", "errno", "functools",
    "heapq", "ipaddress", "itertools", "json", "math", "operator", "random", "re", "struct", "sys",
    "typing", "unicodedata", "zlib",
    "datetime.UTC", "datetime.datetime",
    "socket.AF_INET", "socket.AF_INET6",
}  # fmt: skip

CORE = {
    "core.model": set(),
    "core.tables": {"core.model"},
    "core.codec": {"core.model"},
    "core.state": {"core.model", "core.tables", "core.codec"},
    "core.nat": {"core.model"},
    "core.check": {"core.model"},
    "core.gate": {"core.model", "core.tables", "core.state", "core.codec", "core.nat"},
}
EDGES = {
    "edges.host": set(),
    "edges.bpf": {"edges.host"},
    "edges.kernel": set(),
    "edges.strongswan": set(),
    "edges.holding": {"edges.host"},
}
BASE = {"errors", "trust", "printable"}
ALL_EDGES = {*CORE, *EDGES, *BASE}
PACKAGES: dict[str, set[str]] = {
    "errors": set(),
    "printable": set(),
    "trust": {"errors"},
    "lock": {"errors", "trust"},
    "paths": {"errors"},
    **{package: {*below, "errors"} for package, below in CORE.items()},
    **{package: {*below, *CORE, *BASE} - {"core.gate"} for package, below in EDGES.items()},
    "admin": {*ALL_EDGES, "lock", "paths"},
    "controller": {*ALL_EDGES, "lock", "paths", "admin"},
    "monitor": {*ALL_EDGES, "paths", "admin"},
    "lab": {*ALL_EDGES, "paths"},
    "cli": {*ALL_EDGES, "admin", "controller", "monitor", "lab", "paths"},
    "__main__": {"cli"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def package_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] in ("core", "edges") else 1])


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> Iterator[str]:
    """Yield our modules that a module imports, below ipsecgate."""
    names = {name_of(module) for module in MODULES}
    for imported in imports(path):
        top, _, rest = imported.partition(".")
        if top == "ipsecgate" and rest:
            yield rest if rest in names else rest.rpartition(".")[0] or rest


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_each_room_imports_only_from_the_rooms_below_it(path: Path) -> None:
    name = name_of(path)
    package = package_of(name)
    for imported in ours(path):
        other = package_of(imported)
        if package in PACKAGES and other in PACKAGES and other != package:
            assert other in PACKAGES[package], f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_each_outside_library_is_imported_in_one_place(path: Path) -> None:
    name = name_of(path)
    for imported in imports(path):
        top = imported.split(".")[0]
        if top == "ipsecgate":
            continue
        if top in OUTSIDE:
            assert f"{name}.".startswith(OUTSIDE[top]), f"{name} imports {imported}"
        else:
            assert top in sys.stdlib_module_names, f"{name} imports {imported}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if name_of(path).startswith("core")], ids=name_of
)
def test_core_touches_nothing_outside(path: Path) -> None:
    for imported in imports(path):
        assert imported in PURE or imported.split(".")[0] in {*PURE, "ipsecgate"}, imported
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}


def test_every_module_has_a_package() -> None:
    found = {package_of(name_of(path)) for path in MODULES} - {"", "core", "edges"}
    assert found == PACKAGES.keys()


def test_there_are_no_import_cycles() -> None:
    graph = {name_of(path): set(ours(path)) - {name_of(path)} for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_no_part_of_the_gate_is_given_a_function_to_call_back() -> None:
    """Data flows from events to commands. Only random numbers come through a function."""
    for path in (PACKAGE / "core/gate").glob("*.py"):
        assert set(re.findall(r"(\w+): Callable\[", path.read_text())) <= {"spread"}, path.name
