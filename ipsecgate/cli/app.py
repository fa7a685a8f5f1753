"""The command group: global options, what every verb receives, and how errors are shown."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ipsecgate.cli.messages import console, explain, width_of, wrapped
from ipsecgate.cli.verbs import Verbs
from ipsecgate.errors import GateError
from ipsecgate.paths import DEFAULT_CONFIG, DEFAULT_INSTANCE, Paths
from ipsecgate.printable import as_json, printable, printable_lines

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

    from ipsecgate.edges.host.config import Config


# Not checked by click: /sys/fs/bpf is for root only, and a verb says better that it needs root.
FOLDER = click.Path(path_type=Path, readable=False)
COMPLETING = "_IPSECGATE_COMPLETE"  # set by the completion of a shell


@dataclass
class App:
    """The values of the global options, and the ways to print a result."""

    paths: Paths
    config_required: bool
    json: bool
    verbose: bool

    @cached_property
    def out(self) -> Console:
        """The console on stdout."""
        return console()

    def config(self) -> Config:
        """Read the configuration. Raises: UsageError."""
        from ipsecgate.edges.host import config as configuration  # noqa: PLC0415 - takes 25 ms

        return configuration.load(self.paths.config, required=self.config_required)

    def document(self, data: Any) -> None:
        """Print one JSON document."""
        click.echo(as_json(data, indent=2))

    def done(self, *lines: str, **data: Any) -> None:
        """Print the result of a verb: lines of text, or `data` as JSON."""
        if self.json:
            self.document(data)
            return
        width = width_of(self.out)
        for line in lines:
            self.out.print(wrapped(printable(line), width), soft_wrap=True)


class _OneLine(logging.Formatter):
    """Print each record on one line, and indent a traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802  logging's name
        return printable_lines(super().formatException(ei))


def _instances(context: click.Context, parameter: click.Parameter, typed: str) -> list[Any]:
    from ipsecgate.cli import complete  # noqa: PLC0415 - a start has no use for it

    return complete.instances(context, parameter, typed)


@click.command(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "IPSECGATE"},
    invoke_without_command=True,  # for --version
    no_args_is_help=True,
    examples=[
        ("ipsecgate check", "Find out what this machine lacks."),
        ("ipsecgate status", "See what is gated, covered and refused."),
        ("ipsecgate why", "Explain the last refusal, and what to do."),
        ("ipsecgate attach unit:webshop", "Gate a systemd unit until it is detached."),
        ("ipsecgate exec -- curl http://10.2.0.9/", "Run a command that waits for its SA."),
    ],
)
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Read the configuration from FILE, not from {DEFAULT_CONFIG}.",
)
@click.option(
    "--instance",
    "-i",
    default=DEFAULT_INSTANCE,
    metavar="NAME",
    shell_complete=_instances,
    help="Use the instance NAME. Only a network namespace with IPsec policies of its own needs"
    " another one.",
)
@click.option("--bpffs", type=FOLDER, default=Path("/sys/fs/bpf"), hidden=True)
@click.option("--run-dir", type=FOLDER, default=Path("/run/ipsecgate"), hidden=True)
@click.option("--cache-dir", type=FOLDER, default=Path("/var/cache/ipsecgate"), hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result, or the error, as JSON.")
@click.option(
    "--verbose", "-v", is_flag=True, help="Log debug messages, and show the traceback of an error."
)
@click.option(
    "--version",
    "show_version",
    is_flag=True,
    help="Show the versions of ipsecgate, the kernel, strongSwan and the libraries, and exit.",
)
@click.pass_context
def cli(
    ctx: click.Context,
    *,
    config: Path | None,
    instance: str,
    bpffs: Path,
    run_dir: Path,
    cache_dir: Path,
    as_json: bool,
    verbose: bool,
    show_version: bool,
) -> None:
    """No packet leaves an application towards a protected peer before IPsec is ready.

    Hooks on gated cgroups refuse connect() and sendto() to a protected peer until an SA
    protects the flow. A controller follows strongSwan and the kernel, and starts a
    negotiation when a flow is refused.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    ctx.obj = App(
        paths=Paths(config or DEFAULT_CONFIG, instance, bpffs, run_dir, cache_dir),
        config_required=config is not None,
        json=as_json,
        verbose=verbose,
    )
    if show_version:
        import_module("ipsecgate.cli.version").show(ctx.obj)
        ctx.exit()
    if ctx.invoked_subcommand is None:
        ctx.fail("Missing command.")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.excepthook = _print_defect
    arguments = sys.argv[1:] if argv is None else argv
    ours = set(takewhile(lambda word: word not in Verbs.verbs, arguments))  # the rest is a verb's
    as_document, verbose = "--json" in ours, bool(ours & {"--verbose", "-v"})
    if COMPLETING in os.environ:
        import_module("ipsecgate.cli.shells")  # click finds its classes there
    try:
        code = cli.main(args=arguments, prog_name="ipsecgate", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        _explain_usage(error, as_document)
        sys.exit(error.exit_code)
    except GateError as error:
        explain(error, document=as_document)
        if verbose:
            raise
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        hint = "run it as root" if isinstance(error, PermissionError) else ""
        what = f"{error.filename}: " if error.filename else ""
        explain(GateError(f"{what}{error.strerror or error}", hint=hint), document=as_document)
        sys.exit(1)


def _explain_usage(error: click.ClickException, as_document: bool) -> None:
    context = getattr(error, "ctx", None)
    if context is not None and isinstance(
        error, getattr(click.exceptions, "NoArgsIsHelpError", ())
    ):
        error.show()  # the help
        return
    hint = _usage_hint(error, context) if context is not None else ""
    explain(GateError(error.format_message(), hint=hint), document=as_document)


def _usage_hint(error: click.ClickException, context: click.Context) -> str:
    wrong = getattr(error, "option_name", "")
    if context.parent is not None:
        for option in cli.params:
            if wrong in option.opts:
                written = " ".join(filter(None, (wrong, option.metavar, context.info_name)))
                return f"it goes before the verb: `ipsecgate {written}`"
    return f"`{context.command_path} --help` has the options and examples"


def _print_defect(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback. The text of the exception may come from outside, so it is escaped."""
    lines = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    sys.stderr.write(f"{printable_lines(lines)}\n")
