"""The command line.

`main` is the one exception boundary: it prints a GateError's message and hint, and exits with its
code. The exit codes are listed in `cli.manual`.
"""

from __future__ import annotations

from ipsecgate.cli.app import main

__all__ = ["main"]
