"""Draw what was recorded: pictures in SVG, and a page with all of them."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME, TerminalTheme
from rich.text import Text

from tests.screens.catalogue import SCREENS
from tests.screens.recording import Recorded, shown

DOCS = Path(__file__).parents[2] / "docs/screens"
DOCS_WIDTH = 80
IN_DOCS = {screen.name for screen in SCREENS if screen.in_docs}
SVG = "{http://www.w3.org/2000/svg}"
CHARACTER = 12.2  # the width of one, as rich draws it
THEMES = {"dark": SVG_EXPORT_THEME, "light": DEFAULT_TERMINAL_THEME}


def svg(recorded: Recorded, theme: TerminalTheme = SVG_EXPORT_THEME) -> str:
    """Return the picture of a screen: the command after a prompt, and below it what is shown."""
    console = Console(record=True, width=recorded.columns, file=io.StringIO(), highlight=False)
    prompt = Text.assemble(("# ", "bold green"), " ".join(("ipsecgate", *recorded.argv)))
    console.print(prompt, soft_wrap=True)
    console.print(shown(recorded.output, recorded.columns), soft_wrap=True)
    return console.export_svg(title="", theme=theme)


def lines(picture: str) -> list[str]:
    """Return the lines of text in such a picture, in the order in which they are drawn."""
    rows: dict[float, dict[float, str]] = {}
    for element in ElementTree.fromstring(picture).iter(f"{SVG}text"):
        if "clip-path" in element.attrib:  # not the title of the window
            row = rows.setdefault(float(element.attrib["y"]), {})
            row[float(element.attrib["x"])] = element.text or ""
    found = []
    for _, row in sorted(rows.items()):
        text = ""
        for x, part in sorted(row.items()):
            text = text.ljust(round(x / CHARACTER)) + part.replace("\xa0", " ")
        found.append(text.rstrip())
    return found


def draw_docs(items: Iterable[Recorded]) -> None:
    """Write the pictures of the documentation, and remove those of other screens."""
    DOCS.mkdir(exist_ok=True)
    for old in DOCS.glob("*.svg"):
        old.unlink()
    for item in items:
        if item.columns == DOCS_WIDTH and item.name in IN_DOCS:
            (DOCS / f"{item.name}.svg").write_text(svg(item))


def draw_all(items: Iterable[Recorded], folder: Path) -> None:
    """Write every picture in every theme, and index.html with them."""
    folder.mkdir(parents=True, exist_ok=True)
    page = ["<!doctype html><meta charset=utf-8><title>Screens</title>"]
    page.append("<style>body{background:#888;font-family:sans-serif}img{max-width:100%}</style>")
    for item in items:
        page.append(f"<h2>{html.escape(item.name)}, {item.columns}, exit {item.exit_code}</h2>")
        for theme, colours in THEMES.items():
            name = f"{item.name}-{item.columns}-{theme}.svg"
            (folder / name).write_text(svg(item, colours))
            page.append(f'<img src="{name}">')
    (folder / "index.html").write_text("\n".join(page))
