"""The man page and the shells' completions, made from the commands themselves.

python -m ipsecgate.cli.manual man | bash | zsh | fish
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import click
from click.shell_completion import get_completion_class

from ipsecgate.cli.app import cli

SHELLS = ("bash", "zsh", "fish")
EXIT_CODES = (
    (0, "fine"),
    (1, "refused, or degraded"),
    (2, "usage or configuration; nothing was changed"),
    (3, "no controller"),
    (4, "the kernel lacks something"),
    (124, "timed out"),
)
FILES = (
    ("/etc/ipsecgate/ipsecgate.toml", "the configuration"),
    ("/etc/ipsecgate/policies.d/*.toml", "more policies"),
    ("/run/ipsecgate/control.sock", "the controller's socket, root only"),
    ("/sys/fs/bpf/ipsecgate/", "what is pinned: hooks, tables, links"),
    ("/var/cache/ipsecgate/", "compiled hooks, and what must be protected without a configuration"),
)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every verb by name, in the order of the help."""
    context = click.Context(cli, info_name="ipsecgate")
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        if command is not None and not command.hidden:
            yield name, command


def man_page() -> str:
    """Return ipsecgate(8) as troff. Source: man-pages(7), groff_man(7)."""
    lines = [
        '.TH IPSECGATE 8 "" ipsecgate "System Administration"',
        ".SH NAME",
        rf"ipsecgate \- {_text(_summary(cli)).rstrip('.')}",
        ".SH SYNOPSIS",
        r".B ipsecgate",
        r"[\fIoptions\fR] \fIverb\fR [\fIarguments\fR]",
        ".SH DESCRIPTION",
        *_paragraphs(cli),
        ".SH OPTIONS",
        *_options(cli),
        ".SH VERBS",
    ]
    for name, command in commands():
        words = [_text(w) for w in command.collect_usage_pieces(click.Context(command))]
        lines += [f'.SS "{_text(name)} {" ".join(words)}"', *_paragraphs(command)]
        lines += _options(command)
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXIT_CODES:
        lines += [".TP", rf"\fB{code}\fR", _text(meaning)]
    lines.append(".SH FILES")
    for path, meaning in FILES:
        lines += [".TP", rf"\fI{_text(path)}\fR", _text(meaning)]
    lines += [".SH SEE ALSO", ".BR swanctl (8),", ".BR ip-xfrm (8),", ".BR bpf (2)"]
    return "\n".join(lines) + "\n"


def completion(shell: str) -> str:
    """Return a shell's completion script."""
    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"no completion for {shell}")
    # Only the text: source() of bash's would run bash to ask for its version.
    complete = made(cli, {}, "ipsecgate", "_IPSECGATE_COMPLETE")
    return made.source_template % complete.source_vars()


def _summary(command: click.Command) -> str:
    return (command.help or "").strip().split("\n\n", maxsplit=1)[0].replace("\n", " ")


def _paragraphs(command: click.Command) -> Iterator[str]:
    for number, paragraph in enumerate((command.help or "").strip().split("\n\n")):
        if number:
            yield ".PP"
        yield _text(" ".join(paragraph.split()))


def _options(command: click.Command) -> Iterator[str]:
    context = click.Context(command)
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and record[1] and "--help" not in record[0]:
            names, meaning = record
            yield from (".TP", rf"\fB{_text(names)}\fR", _text(meaning))


def _text(text: str) -> str:
    """Escape what troff would take for its own."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{escaped}" if escaped.startswith((".", "'")) else escaped


def main(arguments: Sequence[str]) -> None:
    """Print what is asked for."""
    (what,) = arguments
    sys.stdout.write(man_page() if what == "man" else completion(what))


if __name__ == "__main__":
    main(sys.argv[1:])
