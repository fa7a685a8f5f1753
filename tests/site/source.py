"""Lay the pages of the site into one folder: docs/*.md, and the pages elsewhere in the checkout.

A link in a page is a path in the checkout. Here it becomes the page of the site, or the picture; a
link to a file that is no page of the site becomes text.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from posixpath import dirname, join, normpath

from tests.site import reference

ROOT = Path(__file__).parents[2]
NAVIGATION = Path(__file__).parent / "navigation.toml"
INDEX = "index"
ELSEWHERE = {
    "README.md": "overview",
    "CHANGELOG.md": "changelog",
    "SECURITY.md": "security",
    "vagrant/README.md": "two-machines",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Section:
    """A part of the navigation: its title, and its pages as (name, title); "" is the page's own."""

    title: str
    pages: tuple[tuple[str, str], ...]


def navigation() -> tuple[Section, ...]:
    """Return what navigation.toml says."""
    document = tomllib.loads(NAVIGATION.read_text())
    return tuple(
        Section(each["title"], tuple(_entry(page) for page in each["pages"]))
        for each in document["section"]
    )


def _entry(text: str) -> tuple[str, str]:
    name, _, title = text.partition(" = ")
    return name, title


def pages() -> dict[str, str]:
    """Return the name on the site of each page in the checkout, by its path in the checkout."""
    ours = {f"docs/{path.name}": path.stem for path in sorted((ROOT / "docs").glob("*.md"))}
    return ours | ELSEWHERE


def on_the_site(text: str, page: str, names: dict[str, str]) -> str:
    """Return a page's text with the links of the site. `page` is its path in the checkout."""

    def changed(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return link[0]
        whole = normpath(join(dirname(page), path))
        if whole in names:
            return f"{picture}[{words}]({names[whole]}.md{hash_sign}{anchor})"
        if picture and whole.startswith("docs/"):
            return f"![{words}]({whole.removeprefix('docs/')})"
        return words if words.strip("`") == whole else f"{words} (`{whole}`)"

    return LINK.sub(changed, text)


def lay(folder: Path) -> None:
    """Write all pages and pictures of the site into an empty folder."""
    names = pages()
    for path, name in names.items():
        text = on_the_site((ROOT / path).read_text(), path, names)
        if name == INDEX:
            text += "\n" + "\n".join(_toctrees())
        (folder / f"{name}.md").write_text(text)
    for name, write in reference.PAGES.items():
        (folder / f"{name}.md").write_text(write())
    for picture in (ROOT / "docs").rglob("*.svg"):
        target = folder / picture.relative_to(ROOT / "docs")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, target)


def _toctrees() -> Iterator[str]:
    for section in navigation():
        yield from ("```{toctree}", ":hidden:", ":titlesonly:", f":caption: {section.title}", "")
        yield from (f"{title} <{name}>" if title else name for name, title in section.pages)
        yield from ("```", "")
