"""Validate a JSON document against the schema that ipsecgate ships for it, and strictly."""

from __future__ import annotations

from typing import Any

import jsonschema

from ipsecgate.admin.schema import schema_of


def strict(schema: Any) -> Any:
    """Return a copy of a schema in which no object may have fields that it does not declare."""
    match schema:
        case dict():
            made = {key: strict(value) for key, value in schema.items()}
            if "properties" in made and "required" in made:
                made["additionalProperties"] = False
            return made
        case list():
            return [strict(item) for item in schema]
    return schema


def wrong(document: Any, declared: Any) -> list[str]:
    """Return a line for each thing in a document that its declared type does not have."""
    validator = jsonschema.Draft202012Validator(strict(schema_of(declared, "document")))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
