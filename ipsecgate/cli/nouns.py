"""The nouns: policies, sas, flows, cgroups, holds. Each shows what is, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.errors import START, GateError
from ipsecgate.printable import printable_document

if TYPE_CHECKING:
    from ipsecgate.admin.documents import Difference

_ALL = click.option(
    "--all", "everything", is_flag=True, help="Show everything, however much it is."
)


@contextmanager
def loaded(app: App) -> Iterator[None]:
    """Say what to do if nothing is loaded."""
    try:
        yield
    except FileNotFoundError as error:
        raise GateError(
            f"the hooks of instance {app.paths.instance!r} are not loaded: nothing is gated",
            hint=f"{START}; or only load the hooks: `ipsecgate load`",
        ) from error


def _show(app: App, name: str, document: Any, *, everything: bool) -> None:
    if app.json:
        app.document(document)
        return
    from ipsecgate.cli import noun_screens  # noqa: PLC0415 - rich takes 25 ms

    draw = getattr(noun_screens, name)
    app.out.print(draw(printable_document(document), app.out.width, everything=everything))


@verb(
    examples=[
        ("ipsecgate policies", "Show each policy, and whether an SA covers it."),
        (
            "ipsecgate policies --check /root/ipsecgate.toml",
            "Show what a changed configuration would open and close.",
        ),
    ],
)
@_ALL
@click.option(
    "--check",
    "candidate",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Show what the configuration in FILE would open and close, and change nothing.",
)
@click.pass_obj
def policies(app: App, *, everything: bool, candidate: Path | None) -> int:
    """Show the policies in force, and whether an SA covers them.

    The first that names a flow decides. With --check, compares the configuration in FILE, and
    in policies.d beside it, with what is in force: which flows would be allowed that are not
    now, which would be protected or refused, and which connections, held calls and SAs that
    touches. Exits with 1 if it opens or closes anything, and with 2 if it is invalid.
    """
    if candidate is not None:
        from ipsecgate.edges.host import config  # noqa: PLC0415 - takes 25 ms

        return show_difference(app, candidate, config.load(candidate), everything=everything)
    from ipsecgate.admin.status import status_of  # noqa: PLC0415

    with loaded(app):
        status = status_of(app.paths, app.config)
    document = {key: status[key] for key in ("controller", "published", "default", "policies")}
    _show(app, "policies", document, everything=everything)
    return 0


def show_difference(app: App, file: Path, candidate: Any, *, everything: bool) -> int:
    """Print what a candidate configuration would change; return the exit code."""
    from ipsecgate.admin.change import compare  # noqa: PLC0415 - only needed here

    document: Difference = compare(app.paths, file, candidate, app.config)
    if app.json:
        app.document(document)
    else:
        from ipsecgate.cli.change_screen import screen  # noqa: PLC0415 - rich takes 25 ms

        app.out.print(screen(printable_document(document), everything=everything))
    return 1 if document["opens"] or document["closes"] else 0


@verb(
    examples=[
        ("ipsecgate sas", "Show the live outbound SAs."),
        ("ipsecgate --json sas", "Print them for a script."),
    ],
)
@_ALL
@click.pass_obj
def sas(app: App, *, everything: bool) -> int:
    """Show the live outbound SAs.

    Without a controller, those by which the hooks still let flows go.
    """
    return _part_of_status(app, "sas", everything=everything)


@verb(
    examples=[
        ("ipsecgate holds", "Show the calls that wait for an SA."),
    ],
)
@_ALL
@click.pass_obj
def holds(app: App, *, everything: bool) -> int:
    """Show the held calls, and what each waits for."""
    return _part_of_status(app, "holds", everything=everything)


def _part_of_status(app: App, name: str, *, everything: bool) -> int:
    from ipsecgate.admin.status import status_of  # noqa: PLC0415

    with loaded(app):
        status = status_of(app.paths, app.config)
    document = {key: each for key, each in status.items() if key in ("controller", name)}
    _show(app, name, document, everything=everything)
    return 0


@verb(
    examples=[
        ("ipsecgate flows", "Show what is connected, refused or allowed."),
        ("ipsecgate --json flows", "Print it for a script."),
    ],
)
@_ALL
@click.pass_obj
def flows(app: App, *, everything: bool) -> int:
    """Show the flows of gated processes.

    Their connections in the gate's network namespace, what was refused lately, and what the
    hooks have allowed since their tables last changed. For each flow, what they would do now.
    """
    from ipsecgate.admin.flows import flows_of  # noqa: PLC0415

    return _own(app, "flows", flows_of, everything=everything)


@verb(
    examples=[
        ("ipsecgate cgroups", "Show what is gated, and by whom."),
    ],
)
@_ALL
@click.pass_obj
def cgroups(app: App, *, everything: bool) -> int:
    """Show the gated cgroups.

    For each, whether the configuration names it or it was gated by hand, its hooks, and other
    tools' programs on it. Also the configured targets that do not exist yet.
    """
    from ipsecgate.admin.gated import cgroups_of  # noqa: PLC0415

    return _own(app, "cgroups", cgroups_of, everything=everything)


def _own(app: App, name: str, read: Callable[..., Any], *, everything: bool) -> int:
    with loaded(app):
        document = read(app.paths, app.config)
    _show(app, name, document, everything=everything)
    return 0
