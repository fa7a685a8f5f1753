"""The pictures in docs/screens show what the commands show: times, pids and counts may differ."""

from __future__ import annotations

import pytest

from tests.screens.catalogue import SCREENS, Screen
from tests.screens.comparing import normalised
from tests.screens.pictures import DOCS, DOCS_WIDTH, lines, svg
from tests.screens.recording import Recorded
from tests.screens.stage import play

IN_DOCS = [screen for screen in SCREENS if screen.in_docs]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Recorded]:
    names = {screen.name for screen in IN_DOCS}
    return {item.name: item for item in play(names, [DOCS_WIDTH])}


@pytest.mark.parametrize("screen", IN_DOCS, ids=lambda screen: screen.name)
def test_a_picture_shows_what_the_command_shows(
    screen: Screen, recorded: dict[str, Recorded]
) -> None:
    drawn = normalised(lines((DOCS / f"{screen.name}.svg").read_text()))
    now = normalised(lines(svg(recorded[screen.name])))
    hint = "if the new screen is right, `make screens` draws the pictures again"
    if screen.moves:
        # With time there are more lines.
        fewer, more = sorted((set(drawn), set(now)), key=len)
        assert sorted(fewer - more) == [], hint
    else:
        assert drawn == now, hint
