"""The class of every verb: a click command whose help ends with examples.

    @verb(examples=[("ipsecgate attach unit:webshop", "Gate a systemd unit.")])
    @click.argument("target")
    @click.pass_obj
    def attach(app: App, target: str) -> None:

The help and the man page show the examples, and tests/unit/test_examples.py parses each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

Example = tuple[str, str]
"""A command line as one types it in a shell, and what it does."""


class Examples(click.Command):
    """A command whose help ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[Example] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples below the options: a comment, and the command below it."""
        super().format_epilog(ctx, formatter)
        if not self.examples:
            return
        with formatter.section("Examples"):
            for command, meaning in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}# {meaning}\n")
                formatter.write(f"{'':{formatter.current_indent}}{command}\n")


def verb(
    name: str | None = None, *, examples: Sequence[Example], **attributes: Any
) -> Callable[[Callable[..., Any]], Examples]:
    """Make a function a verb, as click.command does; `examples` are required."""
    return click.command(name, cls=Examples, examples=examples, **attributes)
