"""The man page and the shell completions match the command line."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ipsecgate.cli.app import cli
from ipsecgate.cli.manual import SHELLS, commands, completion, man_page


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> str:
    page = tmp_path_factory.mktemp("man") / "ipsecgate.8"
    page.write_text(man_page())
    done = subprocess.run(
        ["man", "--warnings", "--encoding=ascii", "-l", str(page)], capture_output=True, text=True,
        check=True, env={"PATH": "/usr/bin:/bin", "MANWIDTH": "200", "LC_ALL": "C"},
    )  # fmt: skip
    assert not done.stderr, "troff prints no warning"
    return done.stdout


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


@pytest.mark.parametrize("shell", SHELLS)
def test_completions_call_the_program(shell: str) -> None:
    script = completion(shell)
    assert f"_IPSECGATE_COMPLETE={shell}_complete" in script


def test_bash_accepts_its_completion(tmp_path: Path) -> None:
    script = tmp_path / "ipsecgate"
    script.write_text(completion("bash"))
    done = subprocess.run(
        ["bash", "-euc", f". {script}; complete -p ipsecgate"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "ipsecgate_completion" in done.stdout
