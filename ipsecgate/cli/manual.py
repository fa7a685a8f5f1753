"""Generate the man pages, the reference of the configuration and the shell completions.

    python -m ipsecgate.cli.manual man | man5 | reference PAGE | bash | zsh | fish

man is ipsecgate(8), man5 is ipsecgate.toml(5), and PAGE is docs/operating.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from ipsecgate.cli import config_reference, troff
from ipsecgate.cli.app import cli
from ipsecgate.cli.shells import SHELLS, script
from ipsecgate.cli.verbs import ENVIRONMENT

EXIT_CODES = (
    (0, "Success."),
    (1, "The command failed or was refused; status: the gate is not healthy; "
     "policies --check and reload --dry-run: flows would open or close; demo: packets of a "
     "gated connection were lost or in clear."),
    (2, "The arguments or the configuration are invalid. Nothing was changed."),
    (3, "No controller answers."),
    (4, "The kernel lacks something."),
    (124, "wait, up, down, status --wait: not in time; demo: the test kernel did not finish in "
     "time."),
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
    """Return ipsecgate(8) as troff."""
    lines = [
        troff.title("ipsecgate", 8, "System Administration"),
        ".SH NAME",
        *troff.paragraphs(f"ipsecgate - {_summary(cli).rstrip('.')}"),
        ".SH SYNOPSIS",
        r"\fBipsecgate\fR [\fIoptions\fR] \fIverb\fR [\fIarguments\fR]",
        ".SH DESCRIPTION",
        *troff.paragraphs((cli.help or "").partition("\n\n")[2]),  # before it is the name line
        ".SH OPTIONS",
        *_options(cli),
        ".SH VERBS",
    ]
    for name, command in commands():
        words = [troff.text(w) for w in command.collect_usage_pieces(click.Context(command))]
        lines += [f'.SS "{troff.text(name)} {" ".join(words)}"']
        lines += [*troff.paragraphs(command.help or ""), *_options(command)]
        lines += [".PP", "Examples:", *troff.examples(command)]
    lines += [".SH EXAMPLES", *troff.examples(cli)]
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXIT_CODES:
        lines += troff.entry(rf"\fB{code}\fR", meaning)
    lines.append(".SH ENVIRONMENT")
    for name, meaning in ENVIRONMENT:
        lines += troff.entry(rf"\fB{name}\fR", meaning)
    lines.append(".SH FILES")
    for path, meaning in FILES:
        lines += troff.entry(rf"\fI{troff.text(path)}\fR", meaning)
    lines += [".SH SEE ALSO", ".BR ipsecgate.toml (5),", ".BR swanctl (8),", ".BR ip\\-xfrm (8),",
              ".BR seccomp_unotify (2)"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _summary(command: click.Command) -> str:
    return (command.help or "").strip().split("\n\n", maxsplit=1)[0].replace("\n", " ")


def _options(command: click.Command) -> Iterator[str]:
    context = click.Context(command)
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and record[1] and "--help" not in record[0]:
            yield from troff.entry(rf"\fB{troff.text(record[0])}\fR", record[1])


def main(arguments: Sequence[str]) -> None:
    """Print a man page or the completion of a shell, or write the reference into a page."""
    match arguments:
        case ["man"]:
            sys.stdout.write(man_page())
        case ["man5"]:
            sys.stdout.write(config_reference.man_page())
        case ["reference", page]:
            config_reference.into(Path(page))
        case [shell] if shell in SHELLS:
            sys.stdout.write(script(shell, cli))
        case _:
            raise click.UsageError("usage: man | man5 | reference PAGE | bash | zsh | fish")


if __name__ == "__main__":
    main(sys.argv[1:])
