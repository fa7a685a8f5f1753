"""Which module may import what: the shape of the house, enforced.

    cli -> controller, loader, report, diagnosis -> edges -> core
    controller -> hooks, kernel, daemon, service, reload, targets, journal
    lab -> edges, core;  cli.demo -> lab

The core imports nothing of ours but the core, and only the standard library;
an outside library has one place.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ipsecgate

PACKAGE = Path(ipsecgate.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Outside library -> the modules that may import it (by prefix, below ipsecgate).
OUTSIDE = {
    "bcc": ("edges.compiler",),
    "pyroute2": ("edges.", "lab."),
    "vici": ("edges.", "lab.", "core.vici"),
    "click": ("cli.", "lab."),
    "rich": ("cli.",),
}

# Layer -> layers of ours that it may import.
LAYERS = {
    "core": {"core", "errors"},
    "edges": {"edges", "core", "errors", "trust"},
    "errors": set(),
    "lock": {"errors", "trust"},
    "trust": {"errors"},
    "paths": {"errors"},
    "loader": {"edges", "core", "errors", "lock", "paths"},
    "report": {"edges", "core", "errors", "loader", "paths"},
    "diagnosis": {"edges", "core", "errors", "loader", "paths"},
    "service": {"edges"},
    "reload": {"edges", "errors"},
    "targets": {"edges", "errors", "loader", "paths"},
    "hooks": {"core", "edges", "errors"},
    "daemon": {"core", "edges"},
    "journal": {"core"},
    "kernel": {"core", "edges"},
    "controller": {
        "core", "daemon", "edges", "errors", "hooks", "journal", "kernel", "loader", "lock",
        "paths", "reload", "report", "service", "targets",
    },
    "lab": {"lab", "edges", "core", "errors", "paths"},
    "__main__": {"cli"},
    "cli": {
        "cli", "controller", "core", "diagnosis", "edges", "errors", "lab", "loader", "paths",
        "report",
    },
}  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_directions(path: Path) -> None:
    name = name_of(path)
    layer = name.split(".")[0]
    for imported in imports(path):
        top, _, rest = imported.partition(".")
        if top == "ipsecgate":
            target = rest.split(".")[0]
            if layer and target in LAYERS:
                assert target in LAYERS[layer], f"{name} imports {imported}"
        elif top in OUTSIDE:
            assert f"{name}.".startswith(OUTSIDE[top]), f"{name} imports {imported}"
        else:
            assert top in sys.stdlib_module_names, f"{name} imports {imported}"


def test_every_module_has_a_layer() -> None:
    found = {name_of(path).split(".")[0] for path in MODULES} - {""}
    assert found <= LAYERS.keys()
