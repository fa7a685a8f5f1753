"""The parts of the site, without building it: navigation, links, pages made from the code."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from markdown_it import MarkdownIt

from ipsecgate.admin.documents import DOCUMENTS
from ipsecgate.cli import manual
from ipsecgate.cli.app import cli
from ipsecgate.edges.host.config_keys import SECTIONS
from tests.site import links, reference, source
from tests.unit.test_commands_in_docs import wrong
from tests.unit.test_docs import LINK

ROOT = Path(__file__).parents[2]


def test_the_navigation_has_every_page_once() -> None:
    """A new page in docs/ needs a place in tests/site/navigation.toml."""
    listed = [name for section in source.navigation() for name, _ in section.pages]
    made = [*source.pages().values(), *reference.PAGES]
    assert sorted([*listed, source.INDEX]) == sorted(made)


def test_every_page_is_reachable_on_the_forge() -> None:
    """From the README, by links in plain Markdown."""
    seen, new = set[Path](), [ROOT / "README.md"]
    while new:
        page = new.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        paths = (link.partition("#")[0] for link in LINK.findall(page.read_text()))
        new += [(page.parent / path).resolve() for path in paths if path and "://" not in path]
    assert {ROOT / path for path in source.pages()} <= seen


def test_the_laid_index_lists_every_page_and_every_link_has_its_file(tmp_path: Path) -> None:
    source.lay(tmp_path)
    index = (tmp_path / "index.md").read_text().splitlines()
    listed = {line.rpartition("<")[2].rstrip(">") for line in index}
    assert {path.stem for path in tmp_path.glob("*.md")} - {source.INDEX} <= listed
    for page in tmp_path.glob("*.md"):
        for link in LINK.findall(page.read_text()):
            if "://" not in link and link.partition("#")[0]:
                assert (tmp_path / link.partition("#")[0]).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("docs/a.md", "[x](b.md#c)", "[x](b.md#c)"),
        ("docs/a.md", "[x](#c)", "[x](#c)"),
        ("docs/a.md", "[x](../README.md#limits)", "[x](overview.md#limits)"),
        ("README.md", "[x](docs/b.md)", "[x](b.md)"),
        ("README.md", "![x](docs/demo.svg)", "![x](demo.svg)"),
        ("docs/a.md", "![x](screens/top.svg)", "![x](screens/top.svg)"),
        ("vagrant/README.md", "[x](../docs/b.md)", "[x](b.md)"),
        ("docs/a.md", "[x](https://example.com/)", "[x](https://example.com/)"),
        ("docs/a.md", "[the rules](../packaging/x.yml)", "the rules (`packaging/x.yml`)"),
        ("docs/a.md", "[`packaging/x.yml`](../packaging/x.yml)", "`packaging/x.yml`"),
    ],
)
def test_a_link_becomes_one_of_the_site(page: str, before: str, after: str) -> None:
    names = {"README.md": "overview", "docs/a.md": "a", "docs/b.md": "b"}
    assert source.on_the_site(before, page, names) == after


def test_the_pages_made_from_the_code_are_whole() -> None:
    commands = reference.commands_page()
    verbs = dict(manual.commands())
    assert {*verbs} == {*cli.list_commands(click.Context(cli))}
    for name, command in verbs.items():
        assert f"\n## {name}\n" in commands
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.opts[-1] in commands
    fences = [token.content for token in MarkdownIt().parse(commands) if token.type == "fence"]
    assert len(fences) == len(verbs)
    assert not wrong("\n".join(f"```\n{each}```" for each in fences))
    for command in verbs.values():
        examples = getattr(command, "examples", ())
        assert any(all(line in fence for line, _ in examples) for fence in fences)
    configuration = reference.configuration_page()
    for section in SECTIONS.values():
        assert f"\n## {section.heading}\n" in configuration
        assert all(f"\n### `{key}`\n" in configuration for key in section.keys)
    documents = reference.documents_page()
    assert all(f"\n## {name}\n" in documents for name in DOCUMENTS)
    assert "any" not in [cell.strip() for cell in documents.split("|")], "a type without words"


def test_what_markdown_would_interpret_is_escaped() -> None:
    assert reference.plain("a *b* [c] <d>\n  `e*f`|g") == r"a \*b\* \[c\] \<d\> `e*f`\|g"


def page(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"<html><head></head><body>{body}</body></html>")


def test_a_whole_site_has_no_problems(tmp_path: Path) -> None:
    page(tmp_path, "index.html", '<a href="a.html#x">x</a><a href="https://example.com/">y</a>')
    page(tmp_path, "a.html", '<h1 id="x">x</h1><a href="#x">x</a><img src="p.svg">')
    (tmp_path / "p.svg").write_text("<svg/>")
    assert links.problems(tmp_path) == []
    assert links.unreachable(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="b.html">x</a>', "b.html leads nowhere"),
        ('<a href="../outside.html">x</a>', "../outside.html leads nowhere"),
        ('<a href="#x">x</a>', "#x: the page has no such anchor"),
        ('<img src="p.svg">', "p.svg leads nowhere"),
        ('<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//cdn.example/x">', "fetches //cdn.example/x"),
        ("<style>@import 'https://cdn.example/x'</style>", "fetches https://cdn.example/x"),
        ("<p style='background: url(//cdn.example/x)'>", "fetches //cdn.example/x"),
    ],
)
def test_a_problem_of_a_page_is_found(body: str, problem: str, tmp_path: Path) -> None:
    (tmp_path.parent / "outside.html").touch()
    page(tmp_path, "index.html", body)
    assert links.problems(tmp_path) == [f"index.html: {problem}"]


def test_what_styles_and_scripts_fetch_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("b { src: url('https://fonts.example/f.woff2') }")
    (tmp_path / "a.js").write_text('import("https://cdn.example/x.mjs")')
    assert links.problems(tmp_path) == [
        "a.css: fetches https://fonts.example/f.woff2",
        "a.js: fetches https://cdn.example/x.mjs",
    ]


def test_a_page_without_a_link_to_it_is_found(tmp_path: Path) -> None:
    page(tmp_path, "index.html", '<a href="a.html">x</a>')
    page(tmp_path, "a.html", '<a href="index.html">x</a>')
    page(tmp_path, "b.html", '<a href="index.html">x</a>')
    assert links.unreachable(tmp_path) == ["b.html"]
