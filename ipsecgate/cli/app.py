"""The command group: global options, and what every verb is given."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import click

from ipsecgate.edges.host import config as configuration
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import GateError
from ipsecgate.paths import DEFAULT_CONFIG, DEFAULT_INSTANCE, Paths
from ipsecgate.printable import as_json, printable, printable_lines

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console


@dataclass
class App:
    """What the global options said."""

    paths: Paths
    config_required: bool
    json: bool
    verbose: bool

    @cached_property
    def out(self) -> Console:
        """Where screens go."""
        return _console()

    def config(self) -> Config:
        """Read the configuration. Raises: UsageError."""
        return configuration.load(self.paths.config, required=self.config_required)

    def document(self, data: Any) -> None:
        """Print one JSON document."""
        click.echo(as_json(data, indent=2))

    def done(self, text: str, **data: Any) -> None:
        """Say what a verb did, in words or as a document."""
        if self.json:
            self.document(data)
        else:
            self.out.print(printable(text))


class _OneLine(logging.Formatter):
    """A record is a line, whatever the text holds; only a traceback below it has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return printable_lines(super().formatException(ei))


class _Lazy(click.Group):
    """Verbs by module, imported when asked for: `status` needs no lab, `run` no demo."""

    verbs: ClassVar = {
        "load": "pins",
        "unload": "pins",
        "attach": "pins",
        "detach": "pins",
        "run": "run",
        "reload": "run",
        "exec": "exec",
        "seccomp-profile": "profile",
        "status": "status",
        "events": "events",
        "check": "check",
        "demo": "demo",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        module = self.verbs.get(cmd_name)
        if module is None:
            return None
        loaded = __import__(f"ipsecgate.cli.{module}", fromlist=[cmd_name])
        # A verb that is a word of Python's has a name with an underscore.
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(loaded, name, None) or getattr(loaded, f"{name}_")
        return command


@click.command(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "IPSECGATE"},
)
@click.option("--config", "-c", type=click.Path(path_type=Path), help=f"Default: {DEFAULT_CONFIG}.")
@click.option(
    "--instance", "-i", default=DEFAULT_INSTANCE, help="One per network namespace, by name."
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--verbose", "-v", is_flag=True, help="Tell more, and show tracebacks.")
@click.version_option(version("ipsecgate"), prog_name="ipsecgate")
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
) -> None:
    """No packet leaves an application towards a protected peer before IPsec is ready.

    Every option can be set in the environment: IPSECGATE_CONFIG, IPSECGATE_INSTANCE,
    IPSECGATE_BPFFS, IPSECGATE_RUN_DIR, IPSECGATE_CACHE_DIR.
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


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    sys.excepthook = _defect
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = cli.main(args=arguments, prog_name="ipsecgate", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        if "--json" in arguments:
            _explain(GateError(error.format_message()), document=True)
        else:
            error.show()
        sys.exit(error.exit_code)
    except GateError as error:
        _explain(error, "--json" in arguments)
        if "--verbose" in arguments or "-v" in arguments:
            raise
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        hint = "run it as root" if isinstance(error, PermissionError) else ""
        _explain(GateError(str(error), hint=hint), "--json" in arguments)
        sys.exit(1)


def _defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of what should not have happened; its text may be others', too."""
    lines = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    sys.stderr.write(f"{printable_lines(lines)}\n")


def _console(*, stderr: bool = False) -> Console:
    # Who has no screen does without: `run` lives long, and `exec` is in a hurry.
    from rich.console import Console  # noqa: PLC0415

    # No markup and no :emoji: codes: screens show text that others wrote, brackets and all.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _explain(error: GateError, document: bool) -> None:
    if document:
        told = {"error": str(error), "hint": error.hint}
        if error.evidence:
            told["evidence"] = error.evidence
        click.echo(as_json(told), err=True)
        return
    console = _console(stderr=True)
    console.print("ipsecgate: ", style="bold red", end="")
    console.print(printable_lines(str(error)), soft_wrap=True)
    for line in error.evidence.splitlines():
        console.print(f"  {printable(line)}", soft_wrap=True)
    if error.hint:
        console.print(f"  {printable_lines(error.hint)}", style="dim", soft_wrap=True)
