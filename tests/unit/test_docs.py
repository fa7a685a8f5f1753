"""The documentation names only what exists: files, functions, pages, headings; and its numbers."""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.core.gate.event_queue import EVENTS_PER_STEP, REFUSALS
from ipsecgate.core.gate.holds import FLOWS_PER_STEP
from ipsecgate.core.gate.spd_table import POLICIES_PER_UPDATE
from ipsecgate.core.tables.layout import ROUTES
from ipsecgate.core.tables.rule_table import (
    COARSE_ENTRIES,
    COARSE_MASKS,
    ENTRY_LIMIT,
    MASK_LIMIT,
    PEER_SHARE,
)

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = ROOT / "docs/architecture.md"

# `path` or `path: name` in backticks; the suffix tells a path from other code.
PLACE = re.compile(r"`([\w./-]+\.(?:py|c|h|sh|list))(?:: ([\w.]+))?`")
# A path below the root anywhere else, as in a command.
FILE = re.compile(
    r"(?<![\w./-])(?:bench|bpf|docs|ipsecgate|packaging|tests|vagrant)/[\w./-]+\.(?:py|c|h|sh|md|list|svg)\b"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def find(path: str) -> Path | None:
    """Return the file that a page names by its path below the root or below ipsecgate/."""
    return next((p for p in (ROOT / path, ROOT / "ipsecgate" / path) if p.is_file()), None)


def names_in(file: Path) -> set[str]:
    """Return what a file defines: functions, classes, their members, variables, C macros."""
    text = file.read_text()
    if file.suffix == ".py":
        return set(_members(ast.parse(text)))
    # Calls are indented, so a name before a bracket in a line that is not is a definition.
    found = re.findall(r"^#define (\w+)|^\w[^\n;=]*?(\w+)\(|^struct (\w+)", text, re.MULTILINE)
    return {name for groups in found for name in groups if name}


def _members(parent: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    for node in parent.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield prefix + name
            case ast.ClassDef(name=name):
                yield prefix + name
                yield from _members(node, f"{prefix}{name}.")
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name
            case ast.Assign(targets=targets):
                yield from (prefix + t.id for t in targets if isinstance(t, ast.Name))


def missing(text: str) -> list[str]:
    """Return the places that a page names and that do not exist."""
    wrong = []
    for path, name in PLACE.findall(text):
        if "/" not in path:
            continue
        file = find(path)
        if file is None or (name and name not in names_in(file)):
            wrong.append(f"{path}: {name}" if name else path)
    return wrong + [path for path in FILE.findall(text) if find(path) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_place_that_a_page_names_exists(page: Path) -> None:
    assert not missing(page.read_text())


def test_a_place_that_does_not_exist_is_found() -> None:
    assert not missing("`core/gate/gate.py: Gate.step` and `bpf/gate.bpf.c: verdict`")
    assert missing("`core/gate/gate.py: Gate.stop`") == ["core/gate/gate.py: Gate.stop"]
    assert missing("`bpf/gate.bpf.c: opinion`") == ["bpf/gate.bpf.c: opinion"]
    assert missing("`core/gate/fence.py`") == ["core/gate/fence.py"]
    assert missing("pytest tests/unit/test_fence.py -x") == ["tests/unit/test_fence.py"]


def test_the_walks_name_functions() -> None:
    """So that another way of writing them does not go unchecked."""
    named = [name for _, name in PLACE.findall(ARCHITECTURE.read_text()) if name]
    assert len(named) > 60


MASKS, ENTRIES = MASK_LIMIT - COARSE_MASKS, ENTRY_LIMIT - COARSE_ENTRIES
HOOKS = dict(
    re.findall(r"^#define (\w+) (\d+)", (ROOT / "bpf/maps.bpf.c").read_text(), re.MULTILINE)
)
DECISIONS, ATTEMPTS = int(HOOKS["DECISIONS"]), {"4": "four"}[HOOKS["ATTEMPTS"]]


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("protected", f"{MASKS:,} distinct selector shapes (masks) and {ENTRIES:,} selectors"),
        ("protected", f"an eighth of the shapes ({MASKS // PEER_SHARE})"),
        ("protected", f"more pieces than fit ({ROUTES:,} routes)"),
        ("protected", f"made {POLICIES_PER_UPDATE} at a time"),
        ("protected", f"allowed (up to {DECISIONS:,}, TCP too)"),
        ("protected", f"decides again, {ATTEMPTS} times in all"),
        ("threat-model", f"decides again, {ATTEMPTS} times in all"),
        ("architecture", f"more than {MASKS:,} masks or {ENTRIES:,} entries"),
        ("architecture", f"{REFUSALS} wait, one for each flow"),
        ("architecture", f"up to {FLOWS_PER_STEP} of them are evaluated"),
        ("threat-model", f"At most {REFUSALS} refusals wait"),
        ("threat-model", f"after at most {EVENTS_PER_STEP} other events"),
        ("threat-model", f"{FLOWS_PER_STEP} flows in a step"),
        ("threat-model", f"made {POLICIES_PER_UPDATE} at a time"),
    ],
)
def test_a_number_in_the_docs_is_the_one_in_the_code(page: str, text: str) -> None:
    assert text in " ".join((ROOT / f"docs/{page}.md").read_text().split())


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def messages(page: Path) -> Iterator[str]:
    """Yield the fixed parts of the messages that the table of symptoms quotes."""
    table = page.read_text().partition("### What you see")[2].partition("\n#")[0]
    for symptom in re.findall(r"^\| (.*?) \|", table, re.MULTILINE):
        for message in re.findall(r"`([^`]+)`", symptom):
            parts = re.split(r"\.\.\.|  |: |\d.*", message)
            yield from (part.strip(" :") for part in parts if part.strip(" :"))


def test_every_message_in_the_table_of_symptoms_exists() -> None:
    code = "".join(path.read_text() for path in (ROOT / "ipsecgate").rglob("*.py"))
    code += os.strerror(errno.ENOENT)
    quoted = list(messages(ROOT / "docs/operating.md"))
    assert len(quoted) > 8
    assert not [part for part in quoted if part not in code]
