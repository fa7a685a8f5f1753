"""wait, up, down: until something is covered by live SAs, and no longer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from ipsecgate.admin import wait as waiting
from ipsecgate.admin.wait import FOREVER, Target, Waited, Wish, cause_of, named
from ipsecgate.cli import complete
from ipsecgate.cli.app import App
from ipsecgate.cli.destination import flows_to
from ipsecgate.cli.exec import seconds
from ipsecgate.cli.verb import verb
from ipsecgate.core.model.flow import Flow
from ipsecgate.edges.host import systemd
from ipsecgate.errors import GateError, TimedOutError, UsageError
from ipsecgate.printable import printable, printable_document

RESOLVE_AGAIN = 1.0  # seconds


def limit(text: str) -> float:
    """Parse a time, or "infinity". Raises: BadParameter."""
    return FOREVER if text == "infinity" else seconds(text)


timeout_option = click.option(
    "--timeout",
    "-t",
    type=limit,
    metavar="TIME",
    default="60s",
    show_default=True,
    help="Give up after this time, such as 500ms, 30s or 2m; infinity: never.",
)


@verb(
    examples=[
        ("ipsecgate wait --all", "Wait until every policy that protects is covered."),
        ("ipsecgate wait --to db.example:5432 --timeout 10s", "Wait for one peer, for 10 seconds."),
        ("ipsecgate wait --policy db && ./backup.sh", "Run a script once a policy is covered."),
        ("ipsecgate wait --all --timeout 0", "Only look: exit with 124 if something is missing."),
    ]
)
@click.option(
    "--to",
    "targets",
    multiple=True,
    metavar="HOST:PORT[/udp]",
    shell_complete=complete.flows,
    help="A destination. A name stands for all of its addresses.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    shell_complete=complete.policies,
    help="A policy that protects.",
)
@click.option("--all", "every", is_flag=True, help="Every policy that protects.")
@click.option("--no-negotiate", is_flag=True, help="Only watch: start no negotiation.")
@timeout_option
@click.pass_obj
def wait(
    app: App,
    *,
    targets: tuple[str, ...],
    policies: tuple[str, ...],
    every: bool,
    no_negotiate: bool,
    timeout: float,
) -> int:
    """Wait until live SAs protect flows or policies.

    Starts the negotiations, as a refused call would, and retries failed ones. A policy is
    covered when every part of it is that a loaded connection would protect. A controller
    that does not run yet is waited for.

    Shows progress on a terminal and is silent in scripts. Exits with 0 once everything is
    covered. When the time is up, prints the cause in IKE's words and exits with 124, or
    with 3 if no controller runs. Exits with 1 at once if something cannot be covered: a
    policy exempts or discards it, or no policy has that name.
    """
    if not (targets or policies or every):
        raise UsageError("wait for what?", hint="name it with --to or --policy, or use --all")
    began = time.monotonic()
    flows = {target: _resolved(target, timeout) for target in targets}
    left = max(0.0, timeout - (time.monotonic() - began)) if timeout else 0.0
    wish = Wish(flows, policies, every=every, negotiate=not no_negotiate)
    found = _wait(app, wish, left)
    if not app.json:
        _refuse(found)
        if sys.stdout.isatty():
            names = [printable(one["target"]) for one in found["targets"]]
            what = names[0] if len(names) == 1 else f"all {len(names)} targets"
            app.done(f"{what}: covered after {found['seconds']:.1f} s")
    return _ended(app, found)


@verb(
    examples=[
        ("ipsecgate up db", "Negotiate what the policy db needs, and wait for it."),
        ("ipsecgate up net/net --timeout 5s", "Bring up one child of strongSwan's."),
    ]
)
@click.argument("name", shell_complete=complete.names)
@timeout_option
@click.pass_obj
def up(app: App, *, name: str, timeout: float) -> int:
    """Negotiate what a policy or a child needs, and wait for it.

    NAME is a policy, or a child that strongSwan has loaded, as "ike/child" or by its own name.
    Exits as `ipsecgate wait` does.
    """
    found = _wait(app, Wish(names=(name,)), timeout)
    if not app.json:
        _refuse(found)
        child = next((one["child"] for one in found["targets"] if one["child"]), None)
        by = f" ({child})" if child and child != name else ""
        app.done(f"up: {name}{by}, after {found['seconds']:.1f} s")
    return _ended(app, found)


@verb(
    examples=[
        ("ipsecgate down db", "End the SAs that protect the networks of the policy db."),
        ("ipsecgate down net/net", "End the SAs of one child of strongSwan's."),
    ]
)
@click.argument("name", shell_complete=complete.names)
@click.option(
    "--timeout",
    "-t",
    type=seconds,
    metavar="TIME",
    default="30s",
    show_default=True,
    help="Wait at most this long for the peer to confirm the end.",
)
@click.pass_obj
def down(app: App, *, name: str, timeout: float) -> int:
    """End the CHILD_SAs of a policy or a child.

    NAME is as for up. Nothing opens: calls to that peer are refused until an SA is up
    again. The next call starts the negotiation, and so does `ipsecgate up`. To keep it
    down, unload the connection in strongSwan. Exits with 124 if the peer does not confirm
    the end in time.
    """
    found = waiting.down(app.paths, name, timeout)
    left = [sa for sa in found["sas"] if not sa["ended"]]
    if app.json:
        app.document(found)
        return 124 if left else 0
    shown = printable_document(found)
    if not shown["sas"]:
        app.done(f"nothing is up for {printable(name)}")
        return 0
    for sa in shown["sas"]:
        state = "ended" if sa["ended"] else "still there"
        app.done(f"{state}: {sa['child']}, {sa['spi']} to {sa['peer']}")
    if shown["policies"]:
        app.done(
            f"calls that policy {', '.join(shown['policies'])} protects are refused until an SA is "
            "up again; the next call starts the negotiation"
        )
    for policy in shown["starts"]:
        app.done(f'policy {policy} has initiate = "start", so it is negotiated again at once')
    if left:
        raise TimedOutError(
            f"the peer {left[0]['peer']} did not confirm the end within {timeout:g} s",
            hint="flows stay covered until strongSwan gives the peer up",
        )
    return 0


def _resolved(target: str, timeout: float) -> list[Flow]:
    """Return the flows of a destination. At boot its name may be unknown for a while.

    Raises: UsageError; TimedOutError.
    """
    began = time.monotonic()
    while True:
        try:
            return flows_to(target)
        except UsageError:
            raise
        except GateError as error:
            if time.monotonic() + RESOLVE_AGAIN > began + timeout:
                raise TimedOutError(f"{error}, within {timeout:g} s", hint=error.hint) from error
            time.sleep(RESOLVE_AGAIN)


def _wait(app: App, wish: Wish, timeout: float) -> Waited:
    with _telling(app, timeout) as tell:
        return waiting.wait(app.paths, wish, timeout, tell)


def _ended(app: App, found: Waited) -> int:
    """Print the document if one is wanted; return the exit code."""
    if app.json:
        app.document(found)
    return 0 if found["covered"] else TimedOutError.exit_code if found["timed_out"] else 1


@contextmanager
def _telling(app: App, timeout: float) -> Iterator[Callable[[Waited | None], None] | None]:
    """Yield what tells people and the service manager of each change; None: nobody listens."""
    if systemd.has_manager():
        yield _tell_manager
    elif app.json or not sys.stderr.isatty():
        yield None
    else:
        from ipsecgate.cli.wait_screen import progress  # noqa: PLC0415 - rich takes 25 ms

        with progress(timeout) as tell:
            yield tell


def _tell_manager(found: Waited | None) -> None:
    if found is None:
        systemd.notify(STATUS="waiting for the controller")
        return
    missing = _missing(found)
    covered = len(found["targets"]) - len(missing)
    first = f"; {named(missing[0])}: {cause_of(missing[0])}" if missing else ""
    systemd.notify(STATUS=f"{covered} of {len(found['targets'])} covered{first}")


def _missing(found: Waited) -> list[Target]:
    return [target for target in found["targets"] if target["state"] != "covered"]


def _refuse(found: Waited) -> None:
    """Raise what says which targets are not covered, and why; nothing if all are.

    Raises: TimedOutError, GateError.
    """
    missing = _missing(found)
    if found["covered"] or not missing:
        return
    never = [target for target in missing if target["state"] == "never"]
    shown = never or missing
    kind = GateError if never else TimedOutError
    state = "cannot be covered" if never else f"not covered after {found['seconds']:.1f} s"
    steps = {target["advice"] for target in shown}
    hint = steps.pop() if len(steps) == 1 else ""
    if len(found["targets"]) == 1:
        raise kind(f"{named(shown[0])}: {state}: {cause_of(shown[0])}", hint=hint)
    evidence = []
    for target in shown:
        evidence.append(f"{named(target)}: {cause_of(target)}")
        if target["advice"] and not hint:
            evidence.append(f"  next: {target['advice']}")
    count = f"{len(shown)} of {len(found['targets'])}"
    raise kind(f"{count} targets: {state}", evidence="\n".join(evidence), hint=hint)
