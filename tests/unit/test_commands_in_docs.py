"""Every command line of ipsecgate in the documentation and in the help is one that it accepts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ipsecgate.cli.app import cli
from ipsecgate.cli.manual import commands
from ipsecgate.errors import GateError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "vagrant/README.md"]

# What may stand before the program: a prompt, sudo, nsenter, a unit's setting, variables.
COMMAND = re.compile(
    r"^(?:[$#] )?(?:sudo |nsenter \S+ |\w+=\S* |Exec\w+=[-+!]?|/usr/bin/)*ipsecgate (\S.*)"
)
INLINE = re.compile(r"`(?:sudo |nsenter \S+ )?ipsecgate (?!\w+:)([^`]+)`")  # not a message
END = re.compile(r"[|>&;]|\d>")  # of the words that the shell hands to the program
PLACEHOLDERS = dict.fromkeys(("PID", "NUMBER", "N", "SECONDS", "TIME", "DURATION"), "1")
PLACEHOLDERS["VERB"] = "status"


def blocks(text: str) -> Iterator[str]:
    """Yield each line of the indented and fenced blocks; a continued line is joined."""
    fenced, whole = False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            whole += line.strip()
            if whole.endswith("\\"):
                whole = whole[:-1]
                continue
            yield whole
        whole = ""


def words(line: str) -> list[str]:
    """Return the arguments of a command line, without comment and redirection."""
    found = []
    for word in shlex.split(line, comments=True):
        if END.match(word):
            break
        found.append(PLACEHOLDERS.get(word, word))
    return found


def problem(arguments: list[str], *, whole: bool = True) -> str:
    """Return why the program does not accept these arguments, "" if it does.

    Not `whole`: the text only names a verb or an option, so the rest may be missing.
    """
    try:
        group = cli.make_context("ipsecgate", list(arguments))
        if not group._protected_args:
            return "" if not whole or group.params["show_version"] else "there is no verb"
        _, verb, rest = cli.resolve_command(group, [*group._protected_args, *group.args])
        if verb is None:
            return "there is no verb"
        verb.make_context(verb.name, rest, parent=group)
    except click.exceptions.Exit:  # --help
        return ""
    except click.MissingParameter as error:
        return error.format_message() if whole else ""
    except click.BadParameter as error:
        # The file of an example need not be there.
        return "" if "does not exist" in error.message else error.format_message()
    except click.ClickException as error:
        return error.format_message()
    except GateError as error:
        return str(error)
    return ""


def wrong(text: str) -> list[str]:
    """Return the commands in a page that the program does not accept, and why."""
    lines = [match[1] for line in blocks(text) if (match := COMMAND.match(line))]
    found = [(line, problem(words(line))) for line in lines]
    squeezed = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for line in INLINE.findall(re.sub(r"\s+", " ", squeezed)):
        found.append((line, problem(words(line), whole=False)))
    return [f"ipsecgate {line}: {why}" for line, why in found if why]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documentation_is_accepted(page: Path) -> None:
    assert not wrong(page.read_text())


def test_every_example_in_the_help_is_accepted() -> None:
    for _, command in commands():
        indented = re.sub(r"^ *", "    ", command.help or "", flags=re.MULTILINE)
        assert not wrong(indented)


def test_commands_are_found() -> None:
    """So that another way of writing them does not go unchecked."""
    lines = [line for page in PAGES for line in blocks(page.read_text())]
    assert sum(bool(COMMAND.match(line)) for line in lines) > 15
    assert sum(len(INLINE.findall(page.read_text())) for page in PAGES) > 25


def test_a_wrong_command_is_found() -> None:
    assert wrong("    ipsecgate wyh 10.2.0.5:5432\n")
    assert wrong("    ipsecgate why 10.2.0.5:5432 --form 10.1.0.1   # from where\n")
    assert wrong("    # ipsecgate attach\n") == ["ipsecgate attach: Missing argument 'TARGET'."]
    assert wrong("Use `ipsecgate --jason status`.")
    assert not wrong("Use `ipsecgate --json`.")
    assert wrong("    ipsecgate exec --hold 3parsecs -- curl \\\n        http://10.2.0.9/\n")
    assert not wrong("    ipsecgate attach unit:web >/dev/null  # quietly\n`ipsecgate attach`\n")
