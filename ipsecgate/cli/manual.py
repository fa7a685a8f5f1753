"""Generate the man page and the shell completions from the commands.

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
    (0, "Success."),
    (1, "The command failed or was refused; status: the gate is not healthy; demo: packets of a "
     "gated connection were lost or in clear."),
    (2, "The arguments or the configuration are invalid. Nothing was changed."),
    (3, "No controller answers."),
    (4, "The kernel lacks something."),
    (124, "demo: the test kernel did not finish in time."),
    (125, "demo: the test kernel did not boot, or crashed."),
    (126, "exec: the command cannot be run."),
    (127, "exec: the command was not found. In all other cases exec exits as its command does."),
    (130, "Interrupted by Ctrl-C."),
)  # fmt: skip
FILES = (
    ("/etc/ipsecgate/ipsecgate.toml", "The configuration."),
    ("/etc/ipsecgate/policies.d/*.toml", "More policies."),
    ("/run/ipsecgate/control.sock", "The socket of the controller, for root only."),
    ("/run/ipsecgate/seccomp.sock", "The socket to which container runtimes send the calls that "
     "are to be held."),
    ("/sys/fs/bpf/ipsecgate/", "The pinned hooks, maps and links."),
    ("/var/cache/ipsecgate/", "The compiled hooks, the policies derived from strongSwan's "
     "connections, and the cgroups of the last valid configuration."),
)  # fmt: skip


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every verb, in the order of `--help`."""
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
        *_paragraphs(cli, first=1),  # paragraph 0 is the name line
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
    lines += [".SH SEE ALSO", ".BR swanctl (8),", ".BR ip-xfrm (8),", ".BR seccomp_unotify (2)"]
    return "\n".join(lines) + "\n"


def completion(shell: str) -> str:
    """Return a shell's completion script."""
    complete_class = get_completion_class(shell)
    if complete_class is None:
        raise click.UsageError(f"no completion for {shell}")
    # Not ShellComplete.source(): for bash it would run bash to check its version.
    complete = complete_class(cli, {}, "ipsecgate", "_IPSECGATE_COMPLETE")
    return complete_class.source_template % complete.source_vars()


def _summary(command: click.Command) -> str:
    return (command.help or "").strip().split("\n\n", maxsplit=1)[0].replace("\n", " ")


def _paragraphs(command: click.Command, first: int = 0) -> Iterator[str]:
    for number, paragraph in enumerate((command.help or "").strip().split("\n\n")[first:]):
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
    """Escape what troff would interpret."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{escaped}" if escaped.startswith((".", "'")) else escaped


def main(arguments: Sequence[str]) -> None:
    """Print the man page, or the completion of a shell."""
    (output,) = arguments
    sys.stdout.write(man_page() if output == "man" else completion(output))


if __name__ == "__main__":
    main(sys.argv[1:])
