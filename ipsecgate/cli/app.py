"""The command group: global options, and what every verb is given."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import click

from ipsecgate.edges import config as configuration
from ipsecgate.edges.config import Config
from ipsecgate.errors import GateError
from ipsecgate.paths import DEFAULT_CONFIG, DEFAULT_INSTANCE, Paths

if TYPE_CHECKING:
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
        click.echo(json.dumps(data, indent=2))

    def done(self, text: str, **data: Any) -> None:
        """Say what a verb did, in words or as a document."""
        if self.json:
            self.document(data)
        else:
            self.out.print(text)


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
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    ctx.obj = App(
        paths=Paths(config or DEFAULT_CONFIG, instance, bpffs, run_dir, cache_dir),
        config_required=config is not None,
        json=as_json,
        verbose=verbose,
    )


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = cli.main(args=arguments, prog_name="ipsecgate", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        if "--json" in arguments:
            _explain(GateError(error.format_message()), as_json=True)
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


def _console(*, stderr: bool = False) -> Console:
    # Who has no screen does without: `run` lives long, and `exec` is in a hurry.
    from rich.console import Console  # noqa: PLC0415

    return Console(stderr=stderr, highlight=False)


def _explain(error: GateError, as_json: bool) -> None:
    if as_json:
        told = {"error": str(error), "hint": error.hint}
        if error.evidence:
            told["evidence"] = error.evidence
        click.echo(json.dumps(told), err=True)
        return
    console = _console(stderr=True)
    console.print("ipsecgate: ", style="bold red", end="")
    console.print(str(error), markup=False, soft_wrap=True)
    for line in error.evidence.splitlines():
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if error.hint:
        console.print(f"  {error.hint}", style="dim", markup=False, soft_wrap=True)
