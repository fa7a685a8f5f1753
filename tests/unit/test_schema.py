"""The JSON schemas: made of the declared types, and strict about names and kinds."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal, NotRequired, TypedDict

import jsonschema
import pytest
from click.testing import CliRunner

from ipsecgate.admin.documents import DOCUMENTS
from ipsecgate.admin.schema import schema_of
from ipsecgate.cli.app import cli
from tests.schemas import strict, wrong
from tests.unit.test_noun_screens import CGROUPS, DIFFERENCE, FLOWS, STATUS


class Part(TypedDict):
    """A part."""

    size: float  # seconds
    parts: NotRequired[list[Part]]


class Whole(Part):
    """A whole."""

    name: str | None  # None: it has none
    kind: Literal["a", "b"]
    counts: dict[str, int]


GOOD = {"size": 1, "name": None, "kind": "a", "counts": {"x": 1}, "parts": [{"size": 0.5}]}


def test_a_schema_says_what_the_type_says() -> None:
    schema = schema_of(Whole, "whole")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert wrong(GOOD, Whole) == []
    whole = schema["$defs"]["Whole"]
    assert whole["description"] == "A whole."
    assert whole["properties"]["size"] == {"type": "number", "description": "seconds"}
    assert whole["properties"]["name"]["description"] == "None: it has none"
    assert set(whole["required"]) == {"size", "name", "kind", "counts"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "1"), ("size", True), ("name", 1), ("kind", "c"), ("counts", {"x": 1.5}),
        ("counts", []), ("parts", [{}]), ("parts", [{"size": 1, "more": 1}]), ("more", 1),
    ],
)  # fmt: skip
def test_a_document_of_another_type_is_wrong(field: str, value: Any) -> None:
    assert wrong({**GOOD, field: value}, Whole)


@pytest.mark.parametrize("field", ["size", "name", "kind", "counts"])
def test_a_missing_field_is_wrong(field: str) -> None:
    assert wrong({key: each for key, each in GOOD.items() if key != field}, Whole)


def test_a_type_without_a_schema_is_an_error() -> None:
    with pytest.raises(TypeError, match="bytes"):
        schema_of(list[bytes], "bytes")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_verb_prints_a_valid_schema(name: str) -> None:
    done = CliRunner().invoke(cli, ["schema", name])
    schema = json.loads(done.output)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema == schema_of(DOCUMENTS[name], name)
    for declared, each in schema["$defs"].items():
        assert each["description"], declared


def test_unknown_names_are_listed() -> None:
    assert CliRunner().invoke(cli, ["schema"]).output.split() == list(DOCUMENTS)
    done = CliRunner().invoke(cli, ["schema", "nonsense"])
    assert done.exception is not None
    assert "nonsense" in str(done.exception)


@pytest.mark.parametrize(
    ("name", "document"),
    [("status", STATUS), ("flows", FLOWS), ("cgroups", CGROUPS), ("difference", DIFFERENCE)],
)
def test_additional_fields_are_allowed_in_what_is_shipped_but_not_in_tests(
    name: str, document: Any
) -> None:
    schema = schema_of(DOCUMENTS[name], name)
    more = {**copy.deepcopy(document), "added_later": 1}
    assert wrong(document, DOCUMENTS[name]) == []
    assert jsonschema.Draft202012Validator(schema).is_valid(more)
    assert not jsonschema.Draft202012Validator(strict(schema)).is_valid(more)
