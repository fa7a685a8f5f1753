"""The pages of the site that are made from the code: commands, configuration, JSON documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import click

from ipsecgate.admin.documents import DOCUMENTS
from ipsecgate.admin.schema import schema_of
from ipsecgate.cli import config_reference
from ipsecgate.cli.app import cli
from ipsecgate.cli.manual import EXIT_CODES, FILES, commands
from ipsecgate.cli.verb import Example
from ipsecgate.edges.host.config_keys import SECTIONS


def commands_page() -> str:
    """Return the page of all verbs, as man ipsecgate has them."""
    lines = [
        "# Commands",
        "",
        "The same text is in `man ipsecgate` and in the `--help` of each verb.",
        "",
    ]
    lines += [*_paragraphs((cli.help or "").partition("\n\n")[2]), *_options(cli)]
    for name, command in commands():
        usage = " ".join(command.collect_usage_pieces(click.Context(command)))
        lines += [f"## {name}", "", f"    ipsecgate {name} {usage}", ""]
        lines += [*_paragraphs(command.help or ""), *_options(command), *_examples(command)]
    lines += ["## Exit codes", "", *_table(("code", "meaning"), _rows(EXIT_CODES))]
    lines += ["## Files", "", *_table(("file", "what it is"), _rows(FILES))]
    return "\n".join(lines)


def configuration_page() -> str:
    """Return the page of all keys of the configuration, as man ipsecgate.toml has them."""
    lines = ["# Configuration", "", "The same text is in `man ipsecgate.toml`.", ""]
    lines += _paragraphs("\n\n".join(config_reference.ABOUT))
    for section in SECTIONS.values():
        lines += [f"## {section.heading}", "", *_paragraphs(section.meaning)]
        for key in section.keys.values():
            lines += [f"### `{key.name}`", "", f"Value: {config_reference.values_of(key, ', ')}. "]
            default = f"Default: {config_reference.default_of(key)}."
            lines += ["Required." if key.required else default, "", key.meaning, ""]
    lines += ["## An example", "", "```toml", config_reference.EXAMPLE.rstrip(), "```", ""]
    return "\n".join(lines)


def documents_page() -> str:
    """Return the page of what --json prints, from the schemas that `ipsecgate schema` prints."""
    lines = ["# JSON documents", ""]
    lines += _paragraphs(
        "What the verbs print with `--json`. `ipsecgate schema NAME` prints the JSON schema of a "
        "document. Fields may be added to a document, but none is renamed or removed."
    )
    for name, document in DOCUMENTS.items():
        lines += [f"## {name}", ""]
        schema = schema_of(document, name)
        for title, record in schema["$defs"].items():
            lines += [f"`{title}`: {plain(record.get('description', ''))}".rstrip(": "), ""]
            fields = record.get("properties", {}).items()
            rows = [(f"`{n}`", _type(f), plain(f.get("description", ""))) for n, f in fields]
            lines += _table(("field", "type", "meaning"), rows)
    return "\n".join(lines)


def _type(field: dict[str, Any]) -> str:
    """Return the type of a field of a schema in words."""
    match field:
        case {"anyOf": choices}:
            return " or ".join(_type(each) for each in choices)
        case {"$ref": place}:
            return f"`{str(place).rpartition('/')[2]}`"
        case {"enum": values}:
            return ", ".join(f"`{json.dumps(each)}`" for each in values)
        case {"const": value}:
            return f"`{json.dumps(value)}`"
        case {"type": "array", "items": {"type": str() as kind}}:
            return f"list of {kind}s"
        case {"type": "array", "items": items}:
            return f"list of {_type(items)}"
        case {"type": "object", "additionalProperties": dict() as values}:
            return f"object: {_type(values)} by name"
        case {"type": kind}:
            return str(kind)
    return "any"


def plain(text: str) -> str:
    """Escape what Markdown would interpret, except `quoted` words; on one line."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    parts[::2] = [re.sub(r"([\\*<>\[\]|])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.replace("\b", "").strip().split("\n\n"):
        yield from (plain(paragraph), "")


def _options(command: click.Command) -> Iterator[str]:
    context = click.Context(command)
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    for name, meaning in (record for record in records if record):
        if meaning and "--help" not in name:
            yield f"- `{name}`: {plain(meaning)}"
    yield ""


def _examples(command: click.Command) -> Iterator[str]:
    shown: tuple[Example, ...] = getattr(command, "examples", ())
    yield "```"
    for line, meaning in shown:
        yield from (f"# {meaning}", line)
    yield from ("```", "")


def _rows(pairs: Iterable[tuple[Any, str]]) -> Iterator[tuple[str, str]]:
    yield from ((f"`{key}`", plain(meaning)) for key, meaning in pairs)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


PAGES = {
    "commands": commands_page,
    "configuration": configuration_page,
    "documents": documents_page,
}
