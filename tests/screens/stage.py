"""Bring the world into each state in turn, and record the screens of that state."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Sequence

from tests.screens.catalogue import (
    BARE,
    CHANGING,
    DEAD,
    EDITED,
    LIVE,
    NOBODY,
    SCREENS,
    Screen,
)
from tests.screens.gated_host import program
from tests.screens.recording import Recorded, record
from tests.screens.world import World

ENVIRONMENT = {"TERM": "xterm-256color", "COLORTERM": "", "LANG": "C.UTF-8", "HOME": "/root"}
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")


def play(names: Container[str], widths: Sequence[int]) -> Iterator[Recorded]:
    """Record these screens in the order in which the states follow each other."""
    wanted = [screen for screen in SCREENS if screen.name in names]
    with World() as world:
        yield from _record(world, wanted, widths, BARE)
        world.start()
        world.settle()
        yield from _record(world, wanted, widths, LIVE)
        yield from _record(world, wanted, widths, NOBODY)
        world.stop(kill=True)
        yield from _record(world, wanted, widths, DEAD)
        world.start()
        world.edit()
        yield from _record(world, wanted, widths, EDITED)
        yield from _record(world, wanted, widths, CHANGING)


def _record(
    world: World, wanted: Sequence[Screen], widths: Sequence[int], state: str
) -> Iterator[Recorded]:
    screens = [screen for screen in wanted if screen.state == state]
    for columns in widths:
        for screen in screens:
            argv = world.words(*screen.argv)
            if state == NOBODY:
                argv = [*AS_NOBODY, *program(*screen.argv)]
            while True:
                before = _settled(world, screen) if state == LIVE else None
                code, output = record(argv, columns, ENVIRONMENT, screen.seconds)
                if before in (None, world.moment):
                    break
            sys.stderr.write(f"{screen.name} {columns}: exit {code}\n")
            text = output.decode(errors="replace")
            yield Recorded(screen.name, screen.argv, columns, code, text)


def _settled(world: World, screen: Screen) -> object:
    """Wait for the state of the screens, and return its moment."""
    world.wait(lambda: world.settled, f"the state is lost before {screen.name}")
    return world.moment
