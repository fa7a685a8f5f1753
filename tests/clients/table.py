"""Make the table in docs/clients.md: how each client reacts to each error.

    python -m tests.clients.table FILE                    run all clients, write the table to FILE
    python -m tests.clients.table --into DOCUMENT FILE    copy the table from FILE into a document

The first form needs a kernel with ESP. `make clients` does both.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.clients.catalogue import catalogue
from tests.clients.client_lab import SAYS, End, Outcome, client_lab

NAMES = [client.name for client in catalogue("", Path())]
ERRORS = tuple(SAYS)
BEGIN, FINISH = "<!-- the table: make clients -->\n", "<!-- end of the table -->\n"
FINE = (End.NAMED, End.VAGUE)


def measured() -> dict[str, dict[str, Outcome]]:
    """Run each client with each error; return the outcomes by error and client."""
    with (
        tempfile.TemporaryDirectory() as cache,
        client_lab("ipsecgate-clients", Path(cache)) as here,
    ):
        return {
            error: {outcome.client.name: outcome for outcome in here.unserved(error, NAMES)}
            for error in ERRORS
        }


def cell(outcome: Outcome, error: str) -> str:
    """Return how a client ended, its exit code, and the number of calls if not 1."""
    end = outcome.end(error)
    words = end.value if end in FINE else f"**{end.value}**: {outcome.error_line(error)[:60]}"
    code = "" if outcome.code is None else f", exit {outcome.code}"
    tries = max(outcome.refused, outcome.held)
    return f"{words}{code}{f', {tries} calls' if tries > 1 else ''}".replace("|", "/")


def rendered(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """Return the table in Markdown."""
    rows = [["client", *ERRORS], ["---"] * (1 + len(ERRORS))]
    rows += [[name, *(cell(outcomes[e][name], e) for e in ERRORS)] for name in NAMES]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def rows_in(document: str) -> dict[str, str]:
    """Return the rows of a document's table, by client."""
    table = document.partition(BEGIN)[2].partition(FINISH)[0]
    rows = [line.strip("| ").partition(" | ") for line in table.splitlines()[2:]]
    return {name: cells for name, _, cells in rows}


def put_into(document: Path, table: str) -> None:
    """Replace the table of a document."""
    head, _, rest = document.read_text().partition(BEGIN)
    document.write_text(head + BEGIN + table + FINISH + rest.partition(FINISH)[2])


def main(arguments: Sequence[str]) -> int:
    """Run the command line."""
    match arguments:
        case ["--into", document, file]:
            put_into(Path(document), Path(file).read_text())
        case [file]:
            Path(file).write_text(rendered(measured()))
        case _:
            sys.stderr.write(__doc__ or "")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
