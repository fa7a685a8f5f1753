"""The man page and the shell completions match the command line."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ipsecgate.cli import config_reference
from ipsecgate.cli.app import cli
from ipsecgate.cli.manual import commands, man_page
from ipsecgate.edges.host.config_keys import SECTIONS, toml

PAGES = {"ipsecgate.8": man_page, "ipsecgate.toml.5": config_reference.man_page}


def shown(folder: Path, name: str) -> str:
    """Return a page as man shows it. Fails if troff warns."""
    page = folder / name
    page.write_text(PAGES[name]())
    done = subprocess.run(
        ["man", "--warnings", "--encoding=ascii", "-l", str(page)], capture_output=True, text=True,
        check=True, env={"PATH": "/usr/bin:/bin", "MANWIDTH": "200", "LC_ALL": "C"},
    )  # fmt: skip
    assert not done.stderr, "troff prints no warning"
    return done.stdout


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shown(tmp_path_factory.mktemp("man"), "ipsecgate.8")


@pytest.mark.parametrize("name", PAGES)
def test_mandoc_finds_nothing_to_mend(name: str, tmp_path: Path) -> None:
    page = tmp_path / name
    page.write_text(PAGES[name]())
    done = subprocess.run(["mandoc", "-Tlint", page], capture_output=True, check=False)
    assert done.stdout + done.stderr == b""
    page.write_text(page.read_text() + ".SH NAME\n.Fo\n")
    assert subprocess.run(["mandoc", "-Tlint", page], capture_output=True, check=False).stdout


def test_the_date_of_a_page_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert all(" 1970-01-02 " in page().splitlines()[0] for page in PAGES.values())


def test_every_key_is_in_the_man_page_of_the_configuration(tmp_path: Path) -> None:
    squeezed = " ".join(shown(tmp_path, "ipsecgate.toml.5").split())
    for section in SECTIONS.values():
        assert f"{section.heading} SECTION" in squeezed
        for key in section.keys.values():
            assert f"{key.name} = " in squeezed
            assert key.meaning.replace("`", "") in squeezed
            assert all(toml(choice) in squeezed for choice in key.choices if not key.values)


def test_the_reference_in_the_docs_is_the_one_in_the_code(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs/operating.md"
    assert config_reference.markdown() in page.read_text(), "make reference"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text().replace("restart the controller", "restart it"))
    config_reference.into(copy)
    assert copy.read_text() == page.read_text()
    (tmp_path / "empty.md").touch()
    with pytest.raises(ValueError, match="has no <!-- the keys"):
        config_reference.into(tmp_path / "empty.md")


def test_every_verb_and_option_is_in_the_man_page(screen: str) -> None:
    assert {name for name, _ in commands()} == set(cli.list_commands(click.Context(cli)))
    for _, command in [("", cli), *commands()]:
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                for name in parameter.opts:
                    assert re.search(rf"(?<![\w-]){name}(?![\w-])", screen), name
    for name, _ in commands():
        assert f"   {name} [OPTIONS]" in screen


def test_every_verb_is_explained(screen: str) -> None:
    squeezed = " ".join(screen.split())
    for _, command in commands():
        assert command.help
        assert " ".join(command.help.split()[:5]) in squeezed


def test_the_list_of_verbs_has_the_first_line_of_each_help() -> None:
    """`ipsecgate --help` prints it without importing the verbs."""
    summaries = {name: summary for name, (_, summary) in cli.verbs.items()}
    assert summaries == {name: (each.help or "").partition("\n")[0] for name, each in commands()}
    screen = CliRunner().invoke(cli, ["--help"], terminal_width=120).output
    for name, summary in summaries.items():
        assert f"  {name}  " in screen
        assert f"  {summary}\n" in screen
