"""The comparison of a JSON document with its declared type finds every kind of difference."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import pytest

from tests.typed_document import mismatches


class Item(TypedDict):
    name: str
    since: float | None


class Document(TypedDict):
    mode: Literal["enforce", "audit"]
    alive: bool
    count: int
    items: list[Item]
    reasons: dict[str, int]
    item: Item | None


GOOD: dict[str, Any] = {
    "mode": "audit",
    "alive": True,
    "count": 1,
    "items": [{"name": "a", "since": 1}, {"name": "b", "since": None}],
    "reasons": {"x": 1},
    "item": None,
}


def test_a_document_that_matches() -> None:
    assert mismatches(GOOD, Document) == []
    assert mismatches({**GOOD, "item": GOOD["items"][0]}, Document) == []


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("mode", "other", "document.mode"),
        ("alive", 1, "document.alive"),
        ("count", True, "document.count"),
        ("count", 1.5, "document.count"),
        ("count", None, "document.count"),
        ("items", {}, "document.items"),
        ("items", [{"name": "a"}], "document.items[0].since: missing"),
        ("items", [{"name": "a", "since": None, "more": 1}], "document.items[0].more: not decl"),
        ("items", [{"name": "a", "since": "now"}], "document.items[0].since"),
        ("items", [None], "document.items[0]"),
        ("reasons", {"x": "1"}, "document.reasons.x"),
        ("item", {"name": "a"}, "document.item"),
    ],
)
def test_a_difference_is_found(field: str, value: Any, where: str) -> None:
    (found,) = mismatches({**GOOD, field: value}, Document)
    assert found.startswith(where)
