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
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import click
from click.shell_completion import CompletionItem

from ipsecgate.cli import complete
from ipsecgate.cli.root import only_root
from ipsecgate.cli.verb import Examples
from ipsecgate.errors import GateError
from ipsecgate.paths import DEFAULT_CONFIG, DEFAULT_INSTANCE, Paths
from ipsecgate.printable import as_json, printable, printable_lines

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

    from ipsecgate.edges.host.config import Config


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
        return _console()

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
        for line in () if self.json else lines:
            self.out.print(printable(line), soft_wrap=True)


class _OneLine(logging.Formatter):
    """Print each record on one line, and indent a traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802  logging's name
        return printable_lines(super().formatException(ei))


class _Verbs(Examples, click.Group):
    """The verbs. Each one's module is imported when it runs: `exec` must start quickly."""

    # Verb -> its module in this package, and the first line of its help.
    verbs: ClassVar = {
        "load": ("pins", "Pin the hooks and their maps."),
        "unload": ("pins", "Remove the hooks and their maps, which opens the gate."),
        "attach": ("pins", "Gate a cgroup and all cgroups below it."),
        "detach": ("pins", "Stop gating a cgroup."),
        "run": ("run", "Run the controller in the foreground."),
        "reload": ("run", "Make the controller read its configuration again."),
        "exec": ("exec", "Run COMMAND gated, and hold its calls until an SA protects them."),
        "seccomp-profile": (
            "profile",
            "Print a seccomp profile that has a container's calls held.",
        ),
        "status": ("status", "Show what is gated, what is refused and why, and what to do."),
        "policies": ("nouns", "Show the policies in force, and whether an SA covers them."),
        "sas": ("nouns", "Show the live outbound SAs."),
        "flows": ("nouns", "Show the flows of gated processes."),
        "cgroups": ("nouns", "Show the gated cgroups."),
        "holds": ("nouns", "Show the held calls, and what each waits for."),
        "why": ("why", "Explain why a flow is let go or refused."),
        "wait": ("wait", "Wait until live SAs protect flows or policies."),
        "up": ("wait", "Negotiate what a policy or a child needs, and wait for it."),
        "down": ("wait", "End the CHILD_SAs of a policy or a child."),
        "unit-dropin": (
            "unit_dropin",
            "Print a systemd drop-in that has a service start only when its peers are protected.",
        ),
        "events": ("events", "Show what was refused or blocked, and why."),
        "top": ("top", "Watch what is refused, negotiating, covered and held, live."),
        "metrics": ("metrics", "Print the gate's metrics for Prometheus, or serve them."),
        "check": ("check", "Check what is missing or does not fit, and say what to do."),
        "bugtool": ("bugtool", "Collect a support bundle without secrets."),
        "schema": ("schema", "Print the JSON schema of a document that --json prints."),
        "demo": ("demo", "Compare first connections with and without the gate."),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in self.verbs:
            return None
        module = import_module(f"ipsecgate.cli.{self.verbs[cmd_name][0]}")
        # A verb that is also a Python built-in, such as exec, is named with an underscore.
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(module, name, None) or getattr(module, f"{name}_")
        return only_root(command, cmd_name)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the verbs without importing them, and the global options."""
        verbs = [
            CompletionItem(name, help=summary)
            for name, (_, summary) in self.verbs.items()
            if name.startswith(incomplete)
        ]
        return [*verbs, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self.verbs.items()])


@click.command(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "IPSECGATE"},
    invoke_without_command=True,  # for --version
    no_args_is_help=True,
    examples=[
        ("ipsecgate check", "Find out what this machine lacks."),
        ("ipsecgate status", "See what is gated, covered and refused."),
        ("ipsecgate why", "Explain the last refusal, and what to do."),
        ("ipsecgate attach unit:postgresql", "Gate a systemd unit until it is detached."),
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
    shell_complete=complete.instances,
    help="Use the instance NAME. A host needs one for each network namespace with gated processes.",
)
@click.option("--bpffs", type=click.Path(path_type=Path), default=Path("/sys/fs/bpf"), hidden=True)
@click.option(
    "--run-dir", type=click.Path(path_type=Path), default=Path("/run/ipsecgate"), hidden=True
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    default=Path("/var/cache/ipsecgate"),
    hidden=True,
)
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
    protects the flow. A controller follows strongSwan and the kernel, and has an SA
    negotiated when a flow is refused.

    The environment variables IPSECGATE_CONFIG and IPSECGATE_INSTANCE set the options of
    these names. IPSECGATE_BPFFS, IPSECGATE_RUN_DIR and IPSECGATE_CACHE_DIR replace the
    folders /sys/fs/bpf, /run/ipsecgate and /var/cache/ipsecgate.
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
    ours = set(takewhile(lambda word: word not in _Verbs.verbs, arguments))  # the rest is a verb's
    as_document, verbose = "--json" in ours, bool(ours & {"--verbose", "-v"})
    if COMPLETING in os.environ:
        import_module("ipsecgate.cli.shells")  # click finds its classes there
    try:
        code = cli.main(args=arguments, prog_name="ipsecgate", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        if as_document:
            _explain(GateError(error.format_message()), document=True)
        else:
            error.show()
        sys.exit(error.exit_code)
    except GateError as error:
        _explain(error, as_document)
        if verbose:
            raise
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        hint = "run it as root" if isinstance(error, PermissionError) else ""
        _explain(GateError(str(error), hint=hint), as_document)
        sys.exit(1)


def _print_defect(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback. The text of the exception may come from outside, so it is escaped."""
    lines = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    sys.stderr.write(f"{printable_lines(lines)}\n")


def _console(*, stderr: bool = False) -> Console:
    # Imported late: `run` should not keep it in memory, and `exec` must start quickly.
    from rich.console import Console  # noqa: PLC0415

    # No markup and no :emoji: codes: screens show text from outside, which may contain both.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _explain(error: GateError, document: bool) -> None:
    if document:
        data = {"error": str(error), "hint": error.hint}
        if error.evidence:
            data["evidence"] = error.evidence
        click.echo(as_json(data), err=True)
        return
    console = _console(stderr=True)
    console.print("ipsecgate: ", style="bold red", end="")
    console.print(printable_lines(str(error)), soft_wrap=True)
    for line in error.evidence.splitlines():
        console.print(f"  {printable(line)}", soft_wrap=True)
    if error.hint:
        console.print(f"  {printable_lines(error.hint)}", style="dim", soft_wrap=True)
