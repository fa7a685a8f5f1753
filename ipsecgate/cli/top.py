"""top: a live view of what is refused, negotiating, covered and held."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import click

from ipsecgate.admin.top_document import Top
from ipsecgate.cli.app import App
from ipsecgate.cli.terminal import Keys, keys
from ipsecgate.cli.top_screen import View, screen
from ipsecgate.cli.verb import verb
from ipsecgate.errors import START, GateError, UsageError
from ipsecgate.monitor.sampler import sample
from ipsecgate.monitor.top import Sample
from ipsecgate.monitor.top import top as compare
from ipsecgate.printable import printable, printable_document

NO_CONTROLLER = 3  # exit code
SHARE = 4  # a sample may take this part of the time between two


@verb(
    examples=[
        ("ipsecgate top", "Watch the policies; press h for the keys."),
        (
            "ipsecgate top --by cgroup --interval 5",
            "Watch the cgroups and their processes, slowly.",
        ),
        (
            "ipsecgate --json top | jq '.policies[] | select(.refused_per_second > 0)'",
            "Print, for a script, which policies refuse now.",
        ),
    ],
)
@click.option("--once", is_flag=True, help="Print the view once, with rates of one interval.")
@click.option(
    "--by",
    type=click.Choice(["policy", "cgroup"]),
    default="policy",
    help="Show policies first, or cgroups with their processes.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="The time between two readings.",
)
@click.pass_obj
def top(app: App, once: bool, by: str, interval: float) -> int:
    """Watch what is refused, negotiating, covered and held, live.

    By policy, or by cgroup with the process that was refused last, and with rates per second.
    The keys are on the screen. Without a controller it shows what the hooks count, and goes
    on trying. With --once or --json it prints one view for scripts, and exits with 3 if no
    controller runs.
    """
    view = View(by="cgroup" if by == "cgroup" else "policy")
    if once or app.json:
        return _once(app, view, interval)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("top needs a terminal", hint="use --once, or `ipsecgate --json top`")
    _live(app, view, interval)
    return 0


def _once(app: App, view: View, interval: float) -> int:
    try:
        before = sample(app.paths, app.config)
        time.sleep(interval)
        document = compare(before, sample(app.paths, app.config))
    except FileNotFoundError as error:
        raise GateError(_NOTHING_LOADED, hint=START) from error
    if app.json:
        app.document(document)
    else:
        shown = printable_document(document)
        app.out.print(screen(shown, "", view, app.out.width, None))
    return 0 if document["controller"] else NO_CONTROLLER


def _live(app: App, view: View, interval: float) -> None:
    from rich.live import Live  # noqa: PLC0415 - only here

    with (
        keys() as terminal,
        Sampler(lambda: sample(app.paths, app.config), interval, terminal) as sampler,
        Live(console=app.out, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
    ):
        document, problem = sampler.latest
        while True:
            width, height = app.out.size
            live.update(screen(document, problem, view, width, height), refresh=True)
            try:
                pressed = terminal.wait(interval)
            except EOFError:
                return
            for key in pressed:
                if key in "qQ":
                    return
                view = view.pressed(key)
            if not view.paused:
                document, problem = sampler.latest


class Sampler:
    """Takes samples in a thread of its own: a controller that hangs must not hold up the keys.

    `latest`: the last document, printable, None if there is none yet; and what kept the last
    sample from being taken, "" if nothing did.
    """

    def __init__(self, take: Callable[[], Sample], interval: float, terminal: Keys) -> None:
        self.latest: tuple[Top | None, str] = None, "reading the gate"
        self._take, self._interval, self._terminal = take, interval, terminal
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for no sample: one may take as long as the controller lets it."""
        self._ended.set()

    def _run(self) -> None:
        before: Sample | None = None
        pause = 0.0
        while not self._ended.wait(pause):
            began = time.monotonic()
            try:
                now = self._take()
                self.latest, before = (printable_document(compare(before, now)), ""), now
            except FileNotFoundError:
                self.latest, before = (None, _NOTHING_LOADED), None
            except (OSError, GateError) as error:
                self.latest = self.latest[0], printable(str(error))
            if not self._ended.is_set():
                self._terminal.wake()
            pause = max(self._interval, SHARE * (time.monotonic() - began))


_NOTHING_LOADED = "the hooks are not loaded: nothing is gated"
