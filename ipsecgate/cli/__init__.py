"""The command line: nouns read, verbs write.

One exception boundary (`main`): a GateError becomes its message, its hint and
its exit code. 0 fine, 1 refused or degraded, 2 usage, 3 no controller, 4 the
kernel lacks something, 124 timed out.
"""

from __future__ import annotations

from ipsecgate.cli.app import main

__all__ = ["main"]
