"""Which verbs only root may run.

Others would see no pins and reach no controller, and say that nothing is gated.
"""

from __future__ import annotations

import copy
import os
from functools import wraps
from typing import Any

import click

from ipsecgate.errors import GateError

VERBS = frozenset(
    [
        "load",
        "unload",
        "attach",
        "detach",
        "run",
        "reload",
        "exec",
        "status",
        "sas",
        "flows",
        "cgroups",
        "holds",
        "events",
        "why",
        "wait",
        "up",
        "down",
        "top",
        "metrics",
        "bugtool",
    ]
)


def only_root(command: click.Command, verb: str) -> click.Command:
    """Return the command, which then refuses to run for another user; its --help still works."""
    run = command.callback
    if verb not in VERBS or run is None:
        return command

    @wraps(run)
    def checked(*arguments: Any, **options: Any) -> Any:
        if os.geteuid():
            raise GateError(
                f"{verb} needs root, and runs as user id {os.geteuid()}",
                hint=f"run it as root: `sudo ipsecgate {verb} ...`",
            )
        return run(*arguments, **options)

    guarded = copy.copy(command)
    guarded.callback = checked
    return guarded
