"""The README's table, made from the results of `runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.matrix.runs import AARCH64, KERNELS, LISTS, UML

BEGIN, END = "<!-- the matrix: make matrix -->\n", "<!-- end of the matrix -->\n"
HEAD = (
    *("kernel", "of", "hooks: passed, failed, skipped", "gate: passed, failed, skipped"),
    *("BPF programs", "BTF", "XFRM interfaces", "can end sockets"),
)
WHERE = {
    UML: "user-mode-linux",
    "bookworm": "Debian 12",
    "trixie": "Debian 13",
    "trixie-backports": "Debian 13, backports",
    AARCH64: "Debian 12, aarch64",
}


def rendered(results: Mapping[str, Any], under: str) -> str:
    """Return the table in Markdown; `under` is a sentence with the programs' versions."""
    rows = [HEAD, ("---",) * len(HEAD)]
    rows += [row(name, results[name]) for name in KERNELS if name in results]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return f"{table}\n{under}{reasons(results)}\n"


def row(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of one kernel."""
    features = result["features"]
    has = (
        ("?",) * 4
        if features is None
        else (
            "compiled (JIT)" if features["jit"] else "interpreted",
            yes(features["btf"]),
            yes(features["xfrm_interfaces"]),
            yes(features["ends_sockets"]),
        )
    )
    return (result["kernel"] or "none", WHERE[name], *map(cell, lists(result)), *has)


def lists(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the counts of each test list."""
    return [result["lists"][name] for name in LISTS]


def cell(counts: Mapping[str, Any]) -> str:
    """Return a list's counts; bold if a test failed or the list stopped."""
    text = f"{counts['passed']}, {counts['failed']}, {counts['skipped']}"
    if counts["stopped"]:
        text += f": {counts['stopped']}".replace("|", "/")
    return f"**{text}**" if counts["failed"] or counts["stopped"] else text


def yes(value: object) -> str:
    return "yes" if value else "no"


def reasons(results: Mapping[str, Any]) -> str:
    """Return a sentence with the reasons of skipped tests, "" if there are none."""
    skips = {
        f"{result['kernel']}: {reason}"
        for result in results.values()
        for counts in lists(result)
        for reason in counts["skips"]
    }
    return f" Skipped: {'; '.join(sorted(skips))}." if skips else ""


def put_into(document: Path, table: str) -> None:
    """Replace a document's table. Raises: ValueError if it has no place for one."""
    head, begin, rest = document.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the matrix in {document}")
    document.write_text(head + BEGIN + table + END + tail)
