"""Every verb's help ends with examples, and the command line accepts each of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from ipsecgate.cli.app import cli
from ipsecgate.cli.manual import commands
from ipsecgate.cli.verb import Examples
from ipsecgate.errors import UsageError

WIDTH = 80


def examples() -> Iterator[tuple[str, str, str]]:
    """Yield verb, command line and meaning, with "" as verb for the examples of the program."""
    for name, command in [("", cli), *commands()]:
        for example in getattr(command, "examples", ()):
            yield name, *example


def parse(line: str) -> click.Context:
    """Return the context of the verb that a command line of a shell calls; nothing is run.

    Raises: click.ClickException, as `ipsecgate` itself would.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True  # punctuation is only what a shell interprets
    words = list(lexer)
    ends = [place for place, word in enumerate(words) if set(word) <= set("|<>&;")]
    assert words[0] == "ipsecgate"
    context = cli.make_context("ipsecgate", words[1 : min(ends, default=None)])
    name, command, arguments = cli.resolve_command(
        context, [*context._protected_args, *context.args]
    )
    assert command is not None
    return command.make_context(name, arguments, parent=context)


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_verb_has_examples(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, Examples)
    assert command.examples
    screen = CliRunner().invoke(cli, [name, "--help"], terminal_width=WIDTH).output
    shown = screen.partition("\nExamples:\n")[2]
    for line, meaning in command.examples:
        assert f"  # {meaning}\n  {line}\n" in shown


@pytest.mark.parametrize(("name", "line", "meaning"), list(examples()), ids=str)
def test_the_command_line_accepts_each_example(
    name: str, line: str, meaning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _, command in commands():
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):  # an example's file need not exist here
                monkeypatch.setattr(parameter.type, "exists", False)
    assert len(line) <= WIDTH - 2
    assert len(meaning) <= WIDTH - 4
    assert meaning[0].isupper()
    assert meaning.endswith(".")
    context = parse(line)
    assert name in ("", context.info_name), "an example shows its own verb"


@pytest.mark.parametrize(
    "line",
    ["ipsecgate why --form 10.2.0.1 10.2.0.5:5432", "ipsecgate atach unit:web", "ipsecgate attach"],
)
def test_a_wrong_example_is_detected(line: str) -> None:
    with pytest.raises((click.UsageError, UsageError)):
        parse(line)
