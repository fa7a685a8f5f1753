"""schema: the JSON schemas of what --json prints."""

from __future__ import annotations

import click

from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.errors import UsageError


@verb(
    examples=[
        ("ipsecgate schema", "List the documents."),
        ("ipsecgate schema status > status.schema.json", "Save the schema of one."),
    ],
)
@click.argument("name", required=False)
@click.pass_obj
def schema(app: App, name: str | None) -> None:
    """Print the JSON schema of a document that --json prints.

    Without NAME, list the documents. Later versions may add fields. Until 1.0 a new minor
    version may also rename or remove some, and the changelog says so.
    """
    from ipsecgate.admin.documents import DOCUMENTS  # noqa: PLC0415
    from ipsecgate.admin.schema import schema_of  # noqa: PLC0415 - few need it

    if name is None:
        app.done(*DOCUMENTS, documents=list(DOCUMENTS))
        return
    if name not in DOCUMENTS:
        raise UsageError(f"no document is called {name!r}", hint=f"one of {', '.join(DOCUMENTS)}")
    app.document(schema_of(DOCUMENTS[name], name))
