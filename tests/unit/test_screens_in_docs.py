"""The documentation shows every picture of docs/screens, and quotes only output that they have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.screens.catalogue import SCREENS
from tests.screens.comparing import normalised
from tests.screens.pictures import DOCS, lines

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROMPT = re.compile(r"[$#] (ipsecgate(?: .*)?)")
BLOCK = re.compile(r"(?:^(?:    .*| *)\n)+|^```(?s:.*?)^```$", re.MULTILINE)


def quoted(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command that stands after a prompt in a block, and the lines below it."""
    for block in BLOCK.findall(text):
        command, output = "", list[str]()
        for line in [*map(str.strip, block.splitlines()), "# ipsecgate"]:
            if prompt := PROMPT.fullmatch(line):
                if output:
                    yield command, output
                command, output = prompt[1], []
            elif command and line and not line.startswith("```"):
                output.append(line)


def missing(text: str, shown: dict[str, list[str]]) -> list[str]:
    """Return the quoted lines that no picture of their command has; `...` stands for any."""
    wrong = []
    for command, output in quoted(text):
        picture = shown.get(command, [])
        wrong += [
            f"{command}: {line}" for line in normalised(output) if line not in [*picture, "..."]
        ]
    return wrong


@pytest.fixture(scope="module")
def shown() -> dict[str, list[str]]:
    """The lines of each picture, by the command."""
    pictures = [lines(file.read_text()) for file in DOCS.glob("*.svg")]
    return {first.removeprefix("# "): normalised(rest) for first, *rest in pictures}


def test_the_pictures_are_those_of_the_catalogue() -> None:
    commands = {
        f"{screen.name}.svg": f"# {' '.join(('ipsecgate', *screen.argv))}"
        for screen in SCREENS
        if screen.in_docs
    }
    drawn = {file.name: lines(file.read_text())[0] for file in DOCS.glob("*.svg")}
    assert drawn == commands, "`make screens` draws them"


def test_every_picture_is_shown() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert not [file.name for file in DOCS.glob("*.svg") if f"screens/{file.name}" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_output_is_that_of_a_picture(page: Path, shown: dict[str, list[str]]) -> None:
    assert not missing(page.read_text(), shown)


def test_other_output_is_found() -> None:
    shown = {"ipsecgate status": ["Controller running, pid N"]}
    text = "See\n\n    # ipsecgate status\n    Controller   running, pid 77\n    ...\n\nand so.\n"
    assert missing(text, shown) == []
    assert missing(text.replace("running", "dead"), shown)
    assert missing(text.replace("status", "why"), shown)
    assert missing(f"```\n$ ipsecgate status\nno\n```\n{text}", shown) == ["ipsecgate status: no"]
