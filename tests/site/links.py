"""Check a built site: every link and anchor leads somewhere, and nothing comes from outside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

# Attributes whose target a browser fetches by itself. A link that one follows may lead anywhere.
FETCHED = {
    ("link", "href"),
    ("script", "src"),
    ("img", "src"),
    ("source", "src"),
    ("iframe", "src"),
    ("form", "action"),
}
PASSIVE = {"canonical", "author", "license", "alternate"}  # of <link rel>
OUTSIDE = re.compile(r"(?:[a-z]+:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^\"')\s]+)")
IN_SCRIPT = re.compile(r"(?:fetch|import|importScripts|open)\(\s*[\"'`]((?:https?:)?//[^\"'`]+)")


@dataclass
class Page(HTMLParser):
    """The anchors of a page, what it links to, and what a browser fetches for it."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record what an element refers to."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        for name, value in values.items():
            if (tag, name) in FETCHED and values.get("rel") not in PASSIVE:
                self.fetched.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


def parse(file: Path) -> Page:
    """Read a page."""
    page = Page()
    page.feed(file.read_text())
    return page


def problems(site: Path) -> list[str]:
    """Return what is wrong with a site, as "page: what"."""
    site = site.resolve()
    pages = {file: parse(file) for file in sorted(site.rglob("*.html"))}
    found = [f"{f.relative_to(site)}: {text}" for f in pages for text in _of_page(site, f, pages)]
    for pattern, suffix in ((IN_STYLE, "css"), (IN_SCRIPT, "js")):
        for file in sorted(site.rglob(f"*.{suffix}")):
            hits = pattern.findall(file.read_text())
            found += [f"{file.relative_to(site)}: fetches {hit}" for hit in hits]
    return found


def _of_page(site: Path, file: Path, pages: dict[Path, Page]) -> Iterator[str]:
    page = pages[file]
    yield from (f"fetches {each}" for each in page.fetched if OUTSIDE.match(each))
    yield from (f"fetches {each}" for each in IN_STYLE.findall(file.read_text()))
    for link in [*page.links, *page.fetched]:
        if OUTSIDE.match(link) or link.startswith(("mailto:", "data:")):
            continue
        path, _, anchor = link.partition("#")
        path = unquote(path.partition("?")[0])
        target = (file.parent / path).resolve() if path else file
        if target.is_dir() or not target.is_relative_to(site) or not target.exists():
            yield f"{link} leads nowhere"
        elif anchor and target.suffix == ".html" and unquote(anchor) not in pages[target].anchors:
            yield f"{link}: the page has no such anchor"


def unreachable(site: Path) -> list[str]:
    """Return the pages to which no links lead from the index."""
    seen, new = set[Path](), [(site / "index.html").resolve()]
    while new:
        file = new.pop()
        if file in seen or file.suffix != ".html" or not file.is_file():
            continue
        seen.add(file)
        page = parse(file)
        paths = (re.split("[?#]", each)[0] for each in [*page.links, *page.fetched])
        new += [
            (file.parent / unquote(path)).resolve()
            for path in paths
            if path and not OUTSIDE.match(path)
        ]
    return sorted(f.name for f in site.rglob("*.html") if f.resolve() not in seen)
