"""The reference of the configuration: ipsecgate.toml(5), and the tables in docs/operating.md.

Both come from `edges.host.config_keys`, as the parser and its errors do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ipsecgate.cli import troff
from ipsecgate.edges.host.config_keys import SECTIONS, Key, toml
from ipsecgate.paths import DEFAULT_CONFIG

BEGIN, END = "<!-- the keys: make reference -->", "<!-- end of the keys -->"
EXAMPLE = """\
[gate]
cgroups = ["unit:webshop"]

[[policy]]
name = "printer"
remote = ["10.2.9.9/32"]
action = "bypass"

[[policy]]
name = "db"
remote = ["10.2.0.0/16", "2001:db8:2::/48"]
protocol = "tcp"
port = "5432"
"""
ABOUT = (
    "The configuration is read at the start of the controller and at each `ipsecgate reload`, as a "
    "whole or not at all: an unknown key or an invalid value is an error that names file and key, "
    "and changes nothing. The files must belong to root, and only root may be able to change them.",
    "The file may be missing; then every key has its default. Each `policies.d/*.toml` beside it "
    "may add `[[policy]]` entries, in the order of the file names.",
    "Without a policy that protects, every remote traffic selector of the connections that "
    "strongSwan has loaded must be protected, apart from what a `bypass` or `discard` policy "
    "names.",
)


def man_page() -> str:
    """Return ipsecgate.toml(5) as troff."""
    lines = [
        troff.title("ipsecgate.toml", 5, "File Formats"),
        ".SH NAME",
        r"ipsecgate.toml \- configuration of ipsecgate",
        ".SH SYNOPSIS",
        rf"\fI{troff.text(str(DEFAULT_CONFIG))}\fR",
        ".br",
        rf"\fI{troff.text(str(DEFAULT_CONFIG.parent / 'policies.d'))}/*.toml\fR",
        ".SH DESCRIPTION",
        *troff.paragraphs("\n\n".join(ABOUT)),
    ]
    for section in SECTIONS.values():
        lines += [f'.SH "{section.heading} SECTION"', *troff.paragraphs(section.meaning)]
        for key in section.keys.values():
            term = rf"\fB{key.name}\fR = {troff.text(values_of(key, ' | '))}"
            default = "Required." if key.required else f"Default: {default_of(key)}."
            lines += troff.entry(term, key.meaning, default)
    lines.append(".SH EXAMPLES")
    lines += troff.paragraphs(
        "Gate PostgreSQL. What it sends to the database port of the other site must be protected; "
        "the printer there is an exception:"
    )
    lines += troff.verbatim(EXAMPLE.rstrip().splitlines())
    lines += [".SH SEE ALSO", ".BR ipsecgate (8),", ".BR swanctl.conf (5)"]
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """Return a table for each section of the configuration, between the markers of the page."""
    return "\n".join([BEGIN, *(line for name in SECTIONS for line in _table(name)), "", END])


def into(page: Path) -> None:
    """Replace what is between the markers of a page. Raises: ValueError if it has none."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{page} has no {BEGIN} and {END}")
    page.write_text(before + markdown() + after)


def _table(name: str) -> Iterator[str]:
    section = SECTIONS[name]
    yield from ("", f"`{section.heading}` {section.meaning}", "")
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for key in section.keys.values():
        default = "required" if key.required else default_of(key)
        yield f"| `{key.name}` | {values_of(key, ', ')} | {default} | {key.meaning} |"


def values_of(key: Key, between: str) -> str:
    """Return what a key may be; `between` stands between two choices."""
    return key.values or between.join(f"`{toml(choice)}`" for choice in key.choices)


def default_of(key: Key) -> str:
    """Return what applies if the key is missing."""
    return key.unset or f"`{toml(key.default)}`"
